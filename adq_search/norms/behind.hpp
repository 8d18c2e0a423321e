// What lies behind a norm and its clipping, forward and backward: nothing, a uniform quantizer of one
// step, or thresholds.

#pragma once

#include <cmath>
#include <vector>

#include "blocks.hpp"
#include "norm.hpp"

namespace {

// y as it would be read, had it been written.
template <class T, class V>
inline V kept_at(const Clipped by, const T* x, V value, long j) {
    return as_stored(clip(open_at(by, value, j), by.low, by.high), x);
}

// Uniform quantization of y.
template <class T>
void uniform_line(const Clipped by, const T* x, float s, float n, float p, T* out, long size) {
    const float per_s = 1.0f / s;
    for_values(size, [=](long j, auto kind) {
        const auto y = kept_at(by, x, at(x, j, kind), j);
        set(out, j, nearest(clip(quotient(y, s, per_s), n, p)) * s);
    });
}

// `add_products` with gradients through uniform quantization; returns the part of the gradient to the
// step.
template <class T>
float add_uniform_products(const Clipped by, const Grid grid, const T* x, const T* upstream,
                           float* first, float* second, long size) {
    return sum_over(size, [=](long j, auto kind) {
        const auto value = at(x, j, kind), gradient = at(upstream, j, kind);
        const auto y = kept_at(by, x, value, j);
        const auto r = let_through(by, value, within(y, grid.low, grid.high, gradient), j);
        add_at(first, j, r);
        add_at(second, j, r * (value - at(by.mean, j, kind)));
        return step_part(grid, y, gradient);
    });
}

// `slopes_line` with gradients through uniform quantization; to each gradient to y its `share` is
// added where the clipping is open, if there are shares.
template <class T>
void uniform_slopes_line(const Clipped by, const Grid grid, const T* x, const T* upstream,
                         const float* share, const Line less, T* grad_x, long size) {
    for_values(size, [=](long j, auto kind) {
        const auto value = at(x, j, kind), y = kept_at(by, x, value, j);
        auto gradient = within(y, grid.low, grid.high, at(upstream, j, kind));
        if (share) gradient += at(share, j, kind);
        set(grad_x, j, less.slope_at(by, value, let_through(by, value, gradient, j), j));
    });
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
    void write(long at, long size, const Line less) {
        slopes_line(by, x + at, grad_y + at, less, grad_x + at, size);
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

    void add(long at, long size, float* first, float* second) {
        *sum += add_uniform_products(by, grid, x + at, upstream + at, first, second, size);
    }
    void end() {}
    void write(long at, long size, const Line less) {
        uniform_slopes_line(by, grid, x + at, upstream + at, nullptr, less, grad_x + at, size);
    }
};

// Thresholds. `grad_x` keeps gradients to y until it is written; `sums` are those of
// `thresholds_backward`.
template <class T>
struct IntervalSlopes {
    Clipped by;
    Intervals known;
    const T *x, *upstream;
    const uint8_t* index;
    T* grad_x;
    float* sums;
    std::vector<T> y;
    IntervalSums parts;
    double codes = 0.0;

    IntervalSlopes(const Clipped by, const Intervals& known, const T* x, const T* upstream,
                   const uint8_t* index, T* grad_x, float* sums, long width)
        : by(by), known(known), x(x), upstream(upstream), index(index), grad_x(grad_x), sums(sums),
          y(width), parts(known.n) {}

    void add(long at, long size, float* first, float* second) {
        clipped_line(by, x + at, y.data(), size);
        codes += interval_slopes(known, y.data(), upstream + at, index + at, grad_x + at, parts,
                                 size);
        add_products(by, x + at, grad_x + at, first, second, size);
    }
    void end() {
        parts.total(sums);
        sums[2 * known.n] = static_cast<float>(codes);
    }
    void write(long at, long size, const Line less) {
        slopes_line(by, x + at, grad_x + at, less, grad_x + at, size);
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
        each_line([&](long at, long size) { behind.write(at, size, pull.line()); });
    });
}

}  // namespace
