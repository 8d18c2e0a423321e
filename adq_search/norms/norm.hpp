// A batch norm and the clipping behind it, line by line.

#pragma once

#include <algorithm>
#include <vector>

#include "blocks.hpp"
#include "lines.hpp"

namespace {

// Pixels whose mean is near enough to the mean of all that no digits are lost in sums of squares.
constexpr long SAMPLE = 64;

// Two sums a channel, from partial sums by block and place in its lines.
struct Sums {
    const Lines& lines;
    std::vector<float> parts;

    explicit Sums(const Lines& lines) : lines(lines), parts(2 * lines.width * lines.blocks) {}

    float* first(long block) { return parts.data() + 2 * lines.width * block; }
    float* second(long block) { return first(block) + lines.width; }

    // The first sums of all channels, then the second.
    std::vector<double> total() const {
        const long n = 2 * lines.width, channels = lines.channels;
        std::vector<double> of_line(n), of_channel(2 * channels);
        for (long block = 0; block < lines.blocks; ++block)
            for (long j = 0; j < n; ++j) of_line[j] += parts[block * n + j];
        for (long j = 0; j < lines.width; ++j) {
            of_channel[j % channels] += of_line[j];
            of_channel[channels + j % channels] += of_line[lines.width + j];
        }
        return of_channel;
    }
};

// y = clip(a x + b, low, high); figures of a line's channels.
struct Clipped {
    const float *a, *b, *mean;
    float low, high;
};

// The figures of a norm: a = weight / sqrt(variance + eps), b = bias - a mean, where `inverse` is
// 1 / sqrt(variance + eps).
struct Norm {
    std::vector<float> a, b, mean;

    Norm(const Lines& lines, const float* weight, const float* bias, const float* means,
         const float* inverse)
        : a(lines.channels), b(lines.channels), mean(lines.repeated({means, means + lines.channels})) {
        for (long c = 0; c < lines.channels; ++c) {
            a[c] = weight[c] * inverse[c];
            b[c] = bias[c] - means[c] * a[c];
        }
        a = lines.repeated(a);
        b = lines.repeated(b);
    }
    Clipped clipped(float low, float high) const {
        return {a.data(), b.data(), mean.data(), low, high};
    }
};

template <class T>
void clipped_line(const Clipped by, const T* __restrict x, T* __restrict y, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j)
        store(y, j, clip(load(x, j) * by.a[j] + by.b[j], by.low, by.high));
}

// The gradient to y where the clipping lets it through, else 0.
template <class T>
inline float let_through(const Clipped by, float x, const T* grad_y, long j) {
    const float y = x * by.a[j] + by.b[j];
    return (y > by.low) & (y < by.high) ? load(grad_y, j) : 0.0f;
}

template <class T>
std::vector<float> sample_mean(const T* x, const Lines& lines) {
    const long some = std::min(lines.pixels, SAMPLE);
    std::vector<float> mean(lines.channels);
    for (long i = 0; i < some; ++i)
        for (long c = 0; c < lines.channels; ++c) mean[c] += load(x, i * lines.channels + c);
    for (float& value : mean) value /= static_cast<float>(some);
    return mean;
}

template <class T>
void add_moments(const float* __restrict near, const T* __restrict x, float* __restrict first,
                 float* __restrict second, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) {
        const float distance = load(x, j) - near[j];
        first[j] += distance;
        second[j] += distance * distance;
    }
}

template <class T>
void add_products(const Clipped by, const T* __restrict x, const T* __restrict grad_y,
                  float* __restrict first, float* __restrict second, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) {
        const float value = load(x, j), r = let_through(by, value, grad_y, j);
        first[j] += r;
        second[j] += r * (value - by.mean[j]);
    }
}

// dx = a r - constant - slope (x - mean). `grad_x` may be `grad_y`.
template <class T>
void slopes_line(const Clipped by, const T* x, const T* grad_y, const float* constant,
                 const float* slope, T* grad_x, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) {
        const float value = load(x, j), r = let_through(by, value, grad_y, j);
        store(grad_x, j, by.a[j] * r - constant[j] - slope[j] * (value - by.mean[j]));
    }
}

// What the sums of a norm's backward pass say: gradients to its weight and bias, and what each
// gradient to x is less of: constant + slope (x - mean).
struct Pull {
    std::vector<float> constant, slope;

    // `products`: by channel, the sums of r, then those of r (x - mean).
    Pull(const std::vector<double>& products, const Lines& lines, double n, const float* weight,
         const float* inverse, float* grad_weight, float* grad_bias)
        : constant(lines.channels), slope(lines.channels) {
        for (long c = 0; c < lines.channels; ++c) {
            const double scaled = products[lines.channels + c] * inverse[c];
            const double a = weight[c] * inverse[c];
            grad_bias[c] = static_cast<float>(products[c]);
            grad_weight[c] = static_cast<float>(scaled);
            constant[c] = static_cast<float>(a * products[c] / n);
            slope[c] = static_cast<float>(a * scaled * inverse[c] / n);
        }
        constant = lines.repeated(constant);
        slope = lines.repeated(slope);
    }
};

}  // namespace
