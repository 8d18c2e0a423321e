// The passes of ASQ behind a norm: one step a sample.

#pragma once

#include <vector>

#include "adapter.hpp"
#include "behind.hpp"
#include "blocks.hpp"
#include "lines.hpp"
#include "norm.hpp"

namespace {

// Sums of y, of 1 and of x - mean, the last two where the clipping lets gradients through.
template <class T>
void add_open(const Clipped by, const T* x, float* sum, float* open, float* distance, long size) {
    for_values(size, [=](long j, auto kind) {
        const auto value = at(x, j, kind), y = open_at(by, value, j);
        const auto one = kind + 1.0f, far = value - at(by.mean, j, kind);
        add_at(sum, j, clip(y, by.low, by.high));
        add_at(open, j, within(y, by.low, by.high, one));
        add_at(distance, j, within(y, by.low, by.high, far));
    });
}

// By channel, of one sample: what `add_open` adds. Channels of `sums` lie `apart` from each other.
template <class T>
void open_sums(const Samples& all, const Clipped by, const T* x, long sample, float* sums, long apart) {
    const long width = all.lines.width;
    std::vector<float> sum(width), open(width), distance(width);
    all.lines_of(sample, [&](long begin, long size) {
        add_open(by, x + begin, sum.data(), open.data(), distance.data(), size);
    });
    all.fold(sum, sums);
    all.fold(open, sums + apart);
    all.fold(distance, sums + 2 * apart);
}

// Gradients to the steps, and by channel the sums of r, then those of r (x - mean).
template <class T>
void sample_slopes(const Samples& all, const Clipped by, const T* x, const T* upstream,
                   const float* steps, float qmin, float qmax, float* grad_steps, float* products,
                   long threads) {
    const long channels = all.lines.channels;
    std::vector<float> parts(2 * all.n * channels);
    all.each(threads, [&](long sample, const auto each_line) {
        std::vector<float> first(all.lines.width), second(all.lines.width);
        const Grid grid(steps[sample], qmin, qmax);
        double sum = 0.0;
        each_line([&](long begin, long size) {
            sum += add_uniform_products(by, grid, x + begin, upstream + begin, first.data(),
                                        second.data(), size);
        });
        grad_steps[sample] = static_cast<float>(sum);
        all.fold(first, &parts[2 * sample * channels]);
        all.fold(second, &parts[(2 * sample + 1) * channels]);
    });
    total_of(parts, 2 * channels, products);
}

// Gradients to x, with `shares` added to those to y, # shape: (samples, channels).
template <class T>
void shared_slopes(const Samples& all, const Clipped by, const Pull& pull, const T* x,
                   const T* upstream, const float* steps, float qmin, float qmax,
                   const float* shares, T* grad_x, long threads) {
    all.each(threads, [&](long sample, const auto each_line) {
        const Grid grid(steps[sample], qmin, qmax);
        const float* own = shares + sample * all.lines.channels;
        const std::vector<float> share = all.lines.repeated(own);
        each_line([&](long begin, long size) {
            uniform_slopes_line(by, grid, x + begin, upstream + begin, share.data(), pull.line(),
                                grad_x + begin, size);
        });
    });
}

// What shares add to the sums of `sample_slopes`. `sums`: as `open_sums` finds them.
inline std::vector<double> with_shares(const float* products, const float* shares, const float* sums,
                                       long samples, long channels) {
    std::vector<double> total(products, products + 2 * channels);
    const float *open = sums + samples * channels, *distance = open + samples * channels;
    for (long i = 0; i < samples * channels; i += channels) {
        for (long c = 0; c < channels; ++c) {
            const double share = shares[i + c];
            total[c] += share * open[i + c];
            total[channels + c] += share * distance[i + c];
        }
    }
    return total;
}

}  // namespace
