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
        for (long begin = 0; begin < lines.width; begin += channels) {
            for (long c = 0; c < channels; ++c) {
                of_channel[c] += of_line[begin + c];
                of_channel[channels + c] += of_line[lines.width + begin + c];
            }
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
        : a(lines.channels), b(lines.channels), mean(lines.repeated(means)) {
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

// What a x + b is, before the clipping.
template <class V>
inline V open_at(const Clipped by, V x, long j) {
    return x * at(by.a, j, x) + at(by.b, j, x);
}

template <class T>
void clipped_line(const Clipped by, const T* x, T* y, long size) {
    for_values(size, [=](long j, auto kind) {
        set(y, j, clip(open_at(by, at(x, j, kind), j), by.low, by.high));
    });
}

// Values where the clipping lets gradients through, else 0; `open` is a x + b.
template <class V>
inline V where_open(const Clipped by, V open, V then) {
    return within(open, by.low, by.high, then);
}

// The gradient to y, let through.
template <class V>
inline V let_through(const Clipped by, V x, V grad_y, long j) {
    return where_open(by, open_at(by, x, j), grad_y);
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
void add_products(const Clipped by, const T* x, const T* grad_y, float* first, float* second,
                  long size) {
    for_values(size, [=](long j, auto kind) {
        const auto value = at(x, j, kind), r = let_through(by, value, at(grad_y, j, kind), j);
        add_at(first, j, r);
        add_at(second, j, r * (value - at(by.mean, j, kind)));
    });
}

// dx = a r - constant - slope (x - mean), where gradients to x are less by the last two.
struct Line {
    const float *constant, *slope;

    template <class V>
    V slope_at(const Clipped by, V x, V r, long j) const {
        return at(by.a, j, x) * r - at(constant, j, x) - at(slope, j, x) * (x - at(by.mean, j, x));
    }
};

// `grad_x` may be `grad_y`.
template <class T>
void slopes_line(const Clipped by, const T* x, const T* grad_y, const Line less, T* grad_x,
                 long size) {
    for_values(size, [=](long j, auto kind) {
        const auto value = at(x, j, kind), r = let_through(by, value, at(grad_y, j, kind), j);
        set(grad_x, j, less.slope_at(by, value, r, j));
    });
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
    Line line() const { return {constant.data(), slope.data()}; }
};

}  // namespace
