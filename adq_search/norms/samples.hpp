// The passes of ASQ behind a norm or a clipping: one step a sample.

#pragma once

#include <vector>

#include "adapter.hpp"
#include "behind.hpp"
#include "blocks.hpp"
#include "lines.hpp"

namespace {

// Bytes of samples that are passed over again soon, and so should stay near.
constexpr long NEAR_BYTES = 1L << 18;

// Lines of each sample, and figures by sample and channel.
struct Samples {
    long n;
    Lines lines;

    Samples(long n, long pixels, long channels) : n(n), lines(pixels, channels) {}

    // Call `use(begin, size)` for each line of a sample.
    template <class Use>
    void lines_of(long sample, const Use use) const {
        for (long begin = 0; begin < lines.size; begin += lines.width)
            use(sample * lines.size + begin, std::min(lines.width, lines.size - begin));
    }
    // Call `work(first, last)` for groups of samples, as many as adapters take at once or as stay near.
    template <class Work>
    void each_group(long bytes_of_value, long threads, const Work work) const {
        const long near = NEAR_BYTES / (lines.size * bytes_of_value);
        const long in_group = std::max(1L, std::min(ROWS, near)), groups = (n + in_group - 1) / in_group;
        if (n * lines.size < VALUES_WORTH_THREADS) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (long group = 0; group < groups; ++group)
            work(group * in_group, std::min(n, (group + 1) * in_group));
    }
    // Call `work(sample, lines)` for each sample, where `lines(use)` is `lines_of` it.
    template <class Work>
    void each(long threads, const Work work) const {
        if (n * lines.size < VALUES_WORTH_THREADS) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (long sample = 0; sample < n; ++sample)
            work(sample, [=](const auto use) { lines_of(sample, use); });
    }
    // Sums of a line's places by channel.
    void fold(const std::vector<float>& of_line, float* of_channels) const {
        std::vector<double> sums(lines.channels);
        for (long begin = 0; begin < lines.width; begin += lines.channels)
            for (long c = 0; c < lines.channels; ++c) sums[c] += of_line[begin + c];
        for (long c = 0; c < lines.channels; ++c) of_channels[c] = static_cast<float>(sums[c]);
    }
};

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

// Clipped values, and their sums by place in the line.
template <class T>
void rectified_line(const T* __restrict x, float low, float high, T* __restrict y,
                    float* __restrict sum, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) store(y, j, clip(load(x, j), low, high));
#pragma omp simd
    for (long j = 0; j < size; ++j) sum[j] += load(y, j);
}

// Gradients to what was clipped: to those given, gradients from elsewhere and shares are added.
template <class T>
void joined_line(const T* __restrict y, const T* __restrict other, const float* __restrict share,
                 float low, float high, T* __restrict grad, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) {
        const float value = load(y, j), sum = load(grad, j) + load(other, j) + share[j];
        store(grad, j, (value > low) & (value < high) ? sum : 0.0f);
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
