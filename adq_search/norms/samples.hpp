// The passes of ASQ behind a norm: one step a sample.

#pragma once

#include <array>
#include <vector>

#include "adapter.hpp"
#include "behind.hpp"
#include "blocks.hpp"
#include "lines.hpp"
#include "norm.hpp"

namespace {

// Means of y by channel, of one sample.
template <class T>
void sample_means(const Samples& all, const Clipped by, const T* x, long sample, float* means) {
    std::vector<float> sum(all.lines.width);
    all.sum_down<1>(sample, {sum.data()}, [=](long j, auto kind) {
        using V = decltype(kind);
        const V a = at(by.a, j, kind), b = at(by.b, j, kind);
        return [=](long i) -> std::array<V, 1> {
            return {clip(at(x, i, V{}) * a + b, by.low, by.high)};
        };
    });
    all.fold(sum, means);
    for (long c = 0; c < all.lines.channels; ++c) means[c] /= static_cast<float>(all.lines.pixels);
}

// `add_uniform_products`; and where the clipping is open, sums of 1 and of x - mean.
template <class T>
float add_open_products(const Behind behind, const T* x, const T* upstream, float* first,
                        float* second, float* open, float* distance, long size) {
    return sum_over(size, [=](long j, auto kind) {
        const Clipped by = behind.by;
        const auto found = gradients_at(behind, x, upstream, j, kind);
        const auto r = where_open(by, found.open, found.to_y);
        const auto far = found.x - at(by.mean, j, kind);
        add_at(first, j, r);
        add_at(second, j, r * far);
        add_at(open, j, where_open(by, found.open, kind + 1.0f));
        add_at(distance, j, where_open(by, found.open, far));
        return found.to_step;
    });
}

// Sums by sample and channel, # shape: (samples, channels) each: those of a norm's backward pass, and
// what shares of gradients to y will add to them.
struct SampleSums {
    std::vector<float> first, second, open, distance;

    explicit SampleSums(long n) : first(n), second(n), open(n), distance(n) {}

    // The sums of all samples by channel, for `Pull`, when shares are added to the gradients.
    std::vector<double> with_shares(const std::vector<float>& shares, long channels) const {
        std::vector<double> total(2 * channels);
        for (size_t i = 0; i < shares.size(); i += channels) {
            for (long c = 0; c < channels; ++c) {
                const double share = shares[i + c];
                total[c] += first[i + c] + share * open[i + c];
                total[channels + c] += second[i + c] + share * distance[i + c];
            }
        }
        return total;
    }
};

// Gradients to the steps, and the sums.
template <class T>
SampleSums sample_slopes(const Samples& all, const Clipped by, const T* x, const T* upstream,
                         const float* steps, float qmin, float qmax, float* grad_steps,
                         long threads) {
    SampleSums found(all.n * all.lines.channels);
    all.each(threads, [&](long sample) {
        const long width = all.lines.width, place = sample * all.lines.channels;
        std::vector<float> first(width), second(width), open(width), distance(width);
        const Behind behind(by, steps[sample], qmin, qmax);
        double sum = 0.0;
        all.along(sample, [&](long at, long size) {
            sum += add_open_products(behind, x + at, upstream + at, first.data(), second.data(),
                                     open.data(), distance.data(), size);
        });
        grad_steps[sample] = static_cast<float>(sum);
        all.fold(first, &found.first[place]);
        all.fold(second, &found.second[place]);
        all.fold(open, &found.open[place]);
        all.fold(distance, &found.distance[place]);
    });
    return found;
}

// Gradients to x, with `shares` added to those to y, # shape: (samples, channels).
template <class T>
void shared_slopes(const Samples& all, const Clipped by, const Pull& pull, const T* x,
                   const T* upstream, const float* steps, float qmin, float qmax,
                   const float* shares, T* grad_x, long threads) {
    all.each(threads, [&](long sample) {
        const Behind behind(by, steps[sample], qmin, qmax);
        const std::vector<float> own = all.lines.repeated(shares + sample * all.lines.channels);
        const float* share = own.data();
        const auto through = [=](auto to_y, auto open, long j) {
            return where_open(by, open, to_y + at(share, j, to_y));
        };
        all.along(sample, [&](long at, long size) {
            uniform_slopes_line(behind, x + at, upstream + at, pull.line(), grad_x + at, size,
                                through);
        });
    });
}

}  // namespace
