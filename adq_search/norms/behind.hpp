// What lies behind a norm and its clipping, forward and backward: nothing, a uniform quantizer of one
// step, or thresholds.

#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "blocks.hpp"
#include "norm.hpp"

namespace {

// Uniform quantization of y, which lies within [low, high], as it would be read had it been written.
// Rounding keeps order: values are clipped once, to what both the norm's clipping and the codes leave.
struct Behind {
    Clipped by;
    Grid grid;
    // Least and largest y / s; and the values within which no code saturates. A bound that y cannot
    // pass is none.
    float z_low, z_high, low, high;

    Behind(const Clipped by, float s, float qmin, float qmax)
        : by(by), grid(s, qmin, qmax), z_low(std::max(qmin, by.low / s)),
          z_high(std::min(qmax, by.high / s)), low(by.low > grid.low ? -INFINITY : grid.low),
          high(by.high < grid.high ? INFINITY : grid.high) {}

    // Whether gradients that pass the quantizer pass the clipping.
    bool is_narrower() const { return by.low <= grid.low && by.high >= grid.high; }
};

template <class T>
void uniform_line(const Behind& behind, const T* x, T* out, long size) {
    const Clipped by = behind.by;
    const float s = behind.grid.step, per_s = behind.grid.per_step;
    const float z_low = behind.z_low, z_high = behind.z_high;
    for_values(size, [=](long j, auto kind) {
        const auto open = as_stored(open_at(by, at(x, j, kind), j), x);
        set(out, j, nearest(clip(quotient(open, s, per_s), z_low, z_high)) * s);
    });
}

// What a gradient to the quantized value becomes.
template <class V>
struct Gradients {
    V x, open, to_y, to_step;
};

template <class T, class V>
inline Gradients<V> gradients_at(const Behind& behind, const T* x, const T* upstream, long j, V kind) {
    const V value = at(x, j, kind), r = at(upstream, j, kind), open = open_at(behind.by, value, j);
    const V y = as_stored(open, x);
    const V z = clip(y * behind.grid.per_step, behind.z_low, behind.z_high);
    const V within_codes = within(y, behind.low, behind.high, z);
    return {value, open, within(y, behind.low, behind.high, r), (nearest(z) - within_codes) * r};
}

// Call `use` with the answer as a constant, so that loops need not ask.
template <class Use>
inline auto either(bool answer, const Use use) {
    return answer ? use(std::true_type{}) : use(std::false_type{});
}

// `add_products` with gradients through uniform quantization; returns the part of the gradient to the
// step.
template <class T>
float add_uniform_products(const Behind behind, const T* x, const T* upstream, float* first,
                           float* second, long size) {
    return either(behind.is_narrower(), [=](const auto is_narrower) {
        return sum_over(size, [=](long j, auto kind) {
            const auto found = gradients_at(behind, x, upstream, j, kind);
            const auto r =
                is_narrower ? found.to_y : where_open(behind.by, found.open, found.to_y);
            add_at(first, j, r);
            add_at(second, j, r * (found.x - at(behind.by.mean, j, kind)));
            return found.to_step;
        });
    });
}

// `slopes_line` with gradients through uniform quantization; `through(to_y, open, j)` is what of
// those to y passes the clipping.
template <class T, class Through>
void uniform_slopes_line(const Behind behind, const T* x, const T* upstream, const Line less,
                         T* grad_x, long size, const Through through) {
    for_values(size, [=](long j, auto kind) {
        const auto value = at(x, j, kind), open = open_at(behind.by, value, j);
        const auto y = as_stored(open, x);
        const auto to_y = within(y, behind.low, behind.high, at(upstream, j, kind));
        set(grad_x, j, less.slope_at(behind.by, value, through(to_y, open, j), j));
    });
}

// What lies behind a norm in its backward pass: `add` for the sums of a block, then `write` for the
// gradients to x.

// Nothing but the clipping.
template <class T>
struct GivenSlopes {
    const Lines& lines;
    Clipped by;
    const T *x, *grad_y;
    T* grad_x;

    void add(long begin, long end, float* first, float* second) {
        lines.along(begin, end, [=](long at, long size) {
            add_products(by, x + at, grad_y + at, first, second, size);
        });
    }
    void write(long begin, long end, const Line less) {
        lines.along(begin, end, [=](long at, long size) {
            slopes_line(by, x + at, grad_y + at, less, grad_x + at, size);
        });
    }
};

// Uniform quantization; `sum` is the part of the gradient to the step.
template <class T>
struct UniformSlopes {
    const Lines& lines;
    Behind behind;
    const T *x, *upstream;
    T* grad_x;
    double* sum;

    void add(long begin, long end, float* first, float* second) {
        lines.along(begin, end, [=](long at, long size) {
            *sum += add_uniform_products(behind, x + at, upstream + at, first, second, size);
        });
    }
    void write(long begin, long end, const Line less) {
        either(behind.is_narrower(), [=](const auto is_narrower) {
            const Clipped by = behind.by;
            const auto through = [=](auto to_y, auto open, long) {
                return is_narrower ? to_y : where_open(by, open, to_y);
            };
            lines.along(begin, end, [=](long at, long size) {
                uniform_slopes_line(behind, x + at, upstream + at, less, grad_x + at, size, through);
            });
        });
    }
};

// Thresholds. `grad_x` keeps gradients to y until it is written; `sums` are those of
// `thresholds_backward`.
template <class T>
struct IntervalSlopes {
    const Lines& lines;
    Clipped by;
    Intervals known;
    const T *x, *upstream;
    const uint8_t* index;
    T* grad_x;
    float* sums;

    void add(long begin, long end, float* first, float* second) {
        std::vector<T> y(lines.width);
        IntervalSums parts(known.n);
        double codes = 0.0;
        lines.along(begin, end, [&](long at, long size) {
            clipped_line(by, x + at, y.data(), size);
            codes += interval_slopes(known, y.data(), upstream + at, index + at, grad_x + at, parts,
                                     size);
            add_products(by, x + at, grad_x + at, first, second, size);
        });
        parts.total(sums);
        sums[2 * known.n] = static_cast<float>(codes);
    }
    void write(long begin, long end, const Line less) {
        GivenSlopes<T>{lines, by, x, grad_x, grad_x}.write(begin, end, less);
    }
};

// The backward pass of a norm; `slopes_of(block)` makes one of the above.
template <class Maker>
void norm_slopes(const Lines& lines, const float* weight, const float* inverse, float* grad_weight,
                 float* grad_bias, long threads, const Maker slopes_of) {
    Sums sums(lines);
    lines.each(threads, [&](long block, long begin, long end) {
        slopes_of(block).add(begin, end, sums.first(block), sums.second(block));
    });
    const Pull pull(sums.total(), lines, static_cast<double>(lines.pixels), weight, inverse,
                    grad_weight, grad_bias);
    lines.each(threads, [&](long block, long begin, long end) {
        slopes_of(block).write(begin, end, pull.line());
    });
}

}  // namespace
