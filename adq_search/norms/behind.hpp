// What lies behind a norm and its clipping, forward and backward: nothing, a uniform quantizer of one
// step, or thresholds.

#pragma once

#include <cmath>
#include <type_traits>
#include <vector>

#include "blocks.hpp"
#include "norm.hpp"

namespace {

// Uniform quantization of y.
template <class T>
void uniform_line(const Clipped by, const T* __restrict x, float s, float n, float p,
                  T* __restrict out, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) {
        const float y = as_stored(clip(load(x, j) * by.a[j] + by.b[j], by.low, by.high), x);
        store(out, j, std::nearbyint(clip(y / s, n, p)) * s);
    }
}

// `add_products` with gradients through uniform quantization; returns the part of the gradient to the
// step. `room` for a line is used where values are rounded: compilers lose their way in one loop that
// does so too.
template <class T>
float add_uniform_products(const Clipped by, const Grid grid, const T* __restrict x,
                           const T* __restrict upstream, float* __restrict first,
                           float* __restrict second, long size, T* __restrict room) {
    constexpr bool is_rounded = !std::is_same_v<T, float>;
    if (is_rounded) clipped_line(by, x, room, size);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long j = 0; j < size; ++j) {
        const float value = load(x, j), y = value * by.a[j] + by.b[j];
        const float kept_y = is_rounded ? load(room, j) : clip(y, by.low, by.high);
        const float grad_y = through_grid(grid, kept_y, load(upstream, j), sum);
        const float r = (y > by.low) & (y < by.high) ? grad_y : 0.0f;
        first[j] += r;
        second[j] += r * (value - by.mean[j]);
    }
    return sum;
}

// `slopes_line` with gradients through uniform quantization.
template <class T>
void uniform_slopes_line(const Clipped by, const Grid grid, const T* __restrict x,
                         const T* __restrict upstream, const float* __restrict constant,
                         const float* __restrict slope, T* __restrict grad_x, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) {
        const float value = load(x, j), open_y = value * by.a[j] + by.b[j];
        const float y = as_stored(clip(open_y, by.low, by.high), x);
        const bool is_open = (open_y > by.low) & (open_y < by.high) & (y > grid.low) & (y < grid.high);
        const float r = is_open ? load(upstream, j) : 0.0f;
        store(grad_x, j, by.a[j] * r - constant[j] - slope[j] * (value - by.mean[j]));
    }
}

// What lies behind a norm in its backward pass, line by line: `add` for the sums, which `end` closes,
// then `write` for the gradients to x.

// Nothing but the clipping.
template <class T>
struct GivenSlopes {
    Clipped by;
    const T *x, *grad_y;
    T* grad_x;

    void add(long at, long size, float* first, float* second) {
        add_products(by, x + at, grad_y + at, first, second, size);
    }
    void end() {}
    void write(long at, long size, const float* constant, const float* slope) {
        slopes_line(by, x + at, grad_y + at, constant, slope, grad_x + at, size);
    }
};

// Uniform quantization; `sum` is the part of the gradient to the step.
template <class T>
struct UniformSlopes {
    Clipped by;
    Grid grid;
    const T *x, *upstream;
    T* grad_x;
    double* sum;
    std::vector<T> room;

    void add(long at, long size, float* first, float* second) {
        *sum += add_uniform_products(by, grid, x + at, upstream + at, first, second, size,
                                     room.data());
    }
    void end() {}
    void write(long at, long size, const float* constant, const float* slope) {
        uniform_slopes_line(by, grid, x + at, upstream + at, constant, slope, grad_x + at, size);
    }
};

// Thresholds. `grad_x` keeps gradients to y until it is written; `sums` are those of
// `thresholds_backward`.
template <class T>
struct IntervalSlopes {
    Clipped by;
    const Intervals* known;
    const T *x, *upstream;
    const uint8_t* index;
    T* grad_x;
    float* sums;
    std::vector<T> y;
    std::vector<float> r, moment;
    std::vector<int32_t> interval;
    IntervalSums parts;
    double codes = 0.0;

    IntervalSlopes(const Clipped by, const Intervals& known, const T* x, const T* upstream,
                   const uint8_t* index, T* grad_x, float* sums, long width)
        : by(by), known(&known), x(x), upstream(upstream), index(index), grad_x(grad_x), sums(sums),
          y(width), r(strips(width)), moment(strips(width)), interval(strips(width)),
          parts(known.last + 1) {}

    void add(long at, long size, float* first, float* second) {
        clipped_line(by, x + at, y.data(), size);
        codes += interval_slopes(*known, y.data(), upstream + at, index + at, grad_x + at, r.data(),
                                 moment.data(), interval.data(), size);
        parts.add(r.data(), moment.data(), interval.data(), size);
        add_products(by, x + at, grad_x + at, first, second, size);
    }
    void end() {
        parts.total(sums);
        sums[2 * (known->last + 1)] = static_cast<float>(codes);
    }
    void write(long at, long size, const float* constant, const float* slope) {
        slopes_line(by, x + at, grad_x + at, constant, slope, grad_x + at, size);
    }
};

// The backward pass of a norm; `slopes_of(block)` makes one of the above.
template <class Maker>
void norm_slopes(const Lines& lines, const float* weight, const float* inverse, float* grad_weight,
                 float* grad_bias, long threads, const Maker slopes_of) {
    Sums sums(lines);
    lines.each(threads, [&](long block, const auto each_line) {
        auto behind = slopes_of(block);
        each_line([&](long at, long size) {
            behind.add(at, size, sums.first(block), sums.second(block));
        });
        behind.end();
    });
    const Pull pull(sums.total(), lines, static_cast<double>(lines.pixels), weight, inverse,
                    grad_weight, grad_bias);
    lines.each(threads, [&](long block, const auto each_line) {
        auto behind = slopes_of(block);
        each_line([&](long at, long size) {
            behind.write(at, size, pull.constant.data(), pull.slope.data());
        });
    });
}

}  // namespace
