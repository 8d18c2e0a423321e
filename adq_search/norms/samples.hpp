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
void add_open(const Clipped by, const T* __restrict x, float* __restrict sum, float* __restrict open,
              float* __restrict distance, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) {
        const float value = load(x, j), y = value * by.a[j] + by.b[j];
        const float is_open = (y > by.low) & (y < by.high) ? 1.0f : 0.0f;
        sum[j] += clip(y, by.low, by.high);
        open[j] += is_open;
        distance[j] += is_open * (value - by.mean[j]);
    }
}

// `uniform_slopes_line`, where a share is added to each gradient to y where the clipping is open.
template <class T>
void shared_slopes_line(const Clipped by, const Grid grid, const T* __restrict x,
                        const T* __restrict upstream, const float* __restrict share,
                        const float* __restrict constant, const float* __restrict slope,
                        T* __restrict grad_x, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) {
        const float value = load(x, j), open_y = value * by.a[j] + by.b[j];
        const float y = as_stored(clip(open_y, by.low, by.high), x);
        const float through = (y > grid.low) & (y < grid.high) ? load(upstream, j) : 0.0f;
        const float r = (open_y > by.low) & (open_y < by.high) ? through + share[j] : 0.0f;
        store(grad_x, j, by.a[j] * r - constant[j] - slope[j] * (value - by.mean[j]));
    }
}

// By channel, of one sample: what `add_open` adds. Channels of `sums` lie `apart` from each other.
template <class T>
void open_sums(const Samples& all, const Clipped by, const T* x, long sample, float* sums, long apart) {
    const std::vector<float> zeros(all.lines.width);
    std::vector<float> sum = zeros, open = zeros, distance = zeros;
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
        std::vector<T> room(all.lines.width);
        const Grid grid(steps[sample], qmin, qmax);
        double sum = 0.0;
        each_line([&](long begin, long size) {
            sum += add_uniform_products(by, grid, x + begin, upstream + begin, first.data(),
                                        second.data(), size, room.data());
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
        const std::vector<float> share = all.lines.repeated({own, own + all.lines.channels});
        each_line([&](long begin, long size) {
            shared_slopes_line(by, grid, x + begin, upstream + begin, share.data(),
                               pull.constant.data(), pull.slope.data(), grad_x + begin, size);
        });
    });
}

// What shares add to the sums of `sample_slopes`. `sums`: as `open_sums` finds them.
inline std::vector<double> with_shares(const float* products, const float* shares, const float* sums,
                                       long samples, long channels) {
    const long n = samples * channels;
    std::vector<double> total(products, products + 2 * channels);
    for (long i = 0; i < n; ++i) {
        total[i % channels] += static_cast<double>(shares[i]) * sums[n + i];
        total[channels + i % channels] += static_cast<double>(shares[i]) * sums[2 * n + i];
    }
    return total;
}

}  // namespace
