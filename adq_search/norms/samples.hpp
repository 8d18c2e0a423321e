// The passes of ASQ behind a norm or a clipping: one step a sample.

#pragma once

#include <vector>

#include "behind.hpp"
#include "blocks.hpp"
#include "lines.hpp"

namespace {

// Lines of each sample, and figures by sample and channel.
struct Samples {
    long n;
    Lines lines;

    Samples(long n, long pixels, long channels) : n(n), lines(pixels, channels) {}

    // Call `work(sample, lines)` for each sample; as `Lines::each` does, with one block a sample.
    template <class Work>
    void each(long threads, const Work work) const {
        const Lines own = lines;
        if (n * own.size < VALUES_WORTH_THREADS) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (long sample = 0; sample < n; ++sample) {
            const long at = sample * own.size;
            work(sample, [=](const auto use) {
                for (long begin = 0; begin < own.size; begin += own.width)
                    use(at + begin, std::min(own.width, own.size - begin));
            });
        }
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

// dx = a r' - constant - slope (x - mean), where r' = r + share where the clipping is open.
template <class T>
void shared_slopes_line(const Clipped by, const T* x, const T* grad_y, const float* share,
                        const float* constant, const float* slope, T* grad_x, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) {
        const float value = load(x, j), y = value * by.a[j] + by.b[j];
        const float r = (y > by.low) & (y < by.high) ? load(grad_y, j) + share[j] : 0.0f;
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

// Passes over tensors, as what Python calls below. `sums`: by sample and channel, what `add_open` adds,
// # shape: (3, samples, channels). `pixels` are those of one sample.
void open_sums(long half, const void* values, const float* weight, const float* bias,
               const float* mean, const float* inverse, float low, float high, float* sums,
               long samples, long pixels, long channels, long threads) {
    const Samples all(samples, pixels, channels);
    const Norm norm(all.lines, weight, bias, mean, inverse);
    const long n = samples * channels;
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        all.each(threads, [&](long sample, const auto each_line) {
            const std::vector<float> zeros(all.lines.width);
            std::vector<float> sum = zeros, open = zeros, distance = zeros;
            each_line([&](long begin, long size) {
                add_open(norm.clipped(low, high), x + begin, sum.data(), open.data(),
                         distance.data(), size);
            });
            all.fold(sum, sums + sample * channels);
            all.fold(open, sums + n + sample * channels);
            all.fold(distance, sums + 2 * n + sample * channels);
        });
    });
}

void uniform_by_sample(long half, const void* values, const float* weight,
                       const float* bias, const float* mean, const float* inverse,
                       float low, float high, const float* steps, const float* qmin,
                       const float* qmax, void* out, long samples, long pixels,
                       long channels, long threads) {
    const Samples all(samples, pixels, channels);
    const Norm norm(all.lines, weight, bias, mean, inverse);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        all.each(threads, [&](long sample, const auto each_line) {
            each_line([&](long begin, long size) {
                uniform_line(norm.clipped(low, high), x + begin, steps[sample], *qmin, *qmax,
                             to + begin, size);
            });
        });
    });
}

// Gradients to y and to the steps, and by channel the sums of r, then those of r (x - mean).
void sample_slopes(long half, const void* values, const void* upstream,
                   const float* weight, const float* bias, const float* mean,
                   const float* inverse, float low, float high, const float* steps,
                   const float* qmin, const float* qmax, void* grad_values,
                   float* grad_steps, float* products, long samples, long pixels,
                   long channels, long threads) {
    const Samples all(samples, pixels, channels);
    const Norm norm(all.lines, weight, bias, mean, inverse);
    const Clipped by = norm.clipped(low, high);
    std::vector<float> parts(2 * samples * channels);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T *x = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        T* grad_y = static_cast<T*>(grad_values);
        all.each(threads, [&](long sample, const auto each_line) {
            std::vector<float> first(all.lines.width), second(all.lines.width);
            std::vector<T> room(all.lines.width);
            const Grid grid(steps[sample], *qmin, *qmax);
            double sum = 0.0;
            each_line([&](long begin, long size) {
                T* kept = grad_y + begin;
                sum += add_uniform_products(by, grid, x + begin, r + begin, first.data(),
                                            second.data(), size, room.data(),
                                            [=](long j, float grad) { store(kept, j, grad); });
            });
            grad_steps[sample] = static_cast<float>(sum);
            all.fold(first, &parts[2 * sample * channels]);
            all.fold(second, &parts[(2 * sample + 1) * channels]);
        });
    });
    total_of(parts, 2 * channels, products);
}

// Turns gradients to y into those to x, in place, after adding `shares` to them where the clipping
// is open, # shape: (samples, channels). `sums` and `products` as found by the two functions above.
void shared_slopes(long half, const void* values, const float* weight, const float* bias,
                   const float* mean, const float* inverse, float low, float high,
                   const float* sums, const float* products, const float* shares,
                   void* grad_values, float* grad_weight, float* grad_bias, long samples,
                   long pixels, long channels, long threads) {
    const Samples all(samples, pixels, channels);
    const Norm norm(all.lines, weight, bias, mean, inverse);
    const long n = samples * channels;
    std::vector<double> total(products, products + 2 * channels);
    for (long i = 0; i < n; ++i) {
        total[i % channels] += static_cast<double>(shares[i]) * sums[n + i];
        total[channels + i % channels] += static_cast<double>(shares[i]) * sums[2 * n + i];
    }
    const Pull pull(total, all.lines, static_cast<double>(samples * pixels), weight, inverse,
                    grad_weight, grad_bias);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T* grad = static_cast<T*>(grad_values);
        all.each(threads, [&](long sample, const auto each_line) {
            const float* own = shares + sample * channels;
            const std::vector<float> share = all.lines.repeated({own, own + channels});
            each_line([&](long begin, long size) {
                shared_slopes_line(norm.clipped(low, high), x + begin, grad + begin, share.data(),
                                   pull.constant.data(), pull.slope.data(), grad + begin, size);
            });
        });
    });
}

}  // namespace
