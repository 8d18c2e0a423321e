// The quantizers' arithmetic on blocks of values, forward and backward.
//
// It is that of the tensor operations in `_through.py`, `_thresholds.py` and `_nearest.py`, operation
// by operation, so that outputs are equal to the last bit (build without contraction of products and
// sums).

#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.hpp"
#include "levels.hpp"
#include "native.hpp"

namespace {

// Values that are summed together.
constexpr long BLOCK = 4096;

// The step in use: `positive_step` of `_through.py`.
inline float positive(float raw, float smallest) {
    const float magnitude = std::fabs(raw);
    return magnitude < smallest ? smallest : magnitude;
}

// ---- LSQ and ASQ: [Esser2020] Eqs. 1-3 and 5, [Zhou2025] Eqs. 5-7 ----

template <class T>
void uniform_block(const T* v, float s, float n, float p, T* out, long size) {
    const float per_s = 1.0f / s;
    for_values(size, [=](long i, auto kind) {
        set(out, i, nearest(clip(quotient(at(v, i, kind), s, per_s), n, p)) * s);
    });
}

// The step and the codes' range that gradients need. Divisions would take as long as memory does: a
// product is exact enough here, where no code depends on the last bit.
struct Grid {
    float n, p, step, low, high, per_step;

    Grid(float s, float n, float p)
        : n(n), p(p), step(s), low(n * s), high(p * s), per_step(1.0f / s) {}
};

// By how much the output of a value changes with the step.
template <class V>
inline V slope_by_step(const Grid grid, V value) {
    const V z = clip(value * grid.per_step, grid.n, grid.p);
    return nearest(z) - within(value, grid.low, grid.high, z);
}

// Of a value, the part of its gradient to the step.
template <class V>
inline V step_part(const Grid grid, V value, V upstream) {
    return slope_by_step(grid, value) * upstream;
}

// Gradients to a block of values; returns its part of the gradient to the step.
template <class T>
float uniform_slopes(const T* v, const T* upstream, const Grid grid, T* grad_v, long size) {
    return sum_over(size, [=](long i, auto kind) {
        const auto value = at(v, i, kind), r = at(upstream, i, kind);
        set(grad_v, i, within(value, grid.low, grid.high, r));
        return step_part(grid, value, r);
    });
}

// The latter alone.
template <class T>
float step_slope(const T* v, const T* upstream, const Grid grid, long size) {
    return sum_over(size, [=](long i, auto kind) {
        return step_part(grid, at(v, i, kind), at(upstream, i, kind));
    });
}

// ---- POT, POST and root-r: [Zhou2025] Eqs. 3 and 17 ----

// Values in units of alpha.
template <class T>
inline Strip in_units(const T* v, float alpha, long n) {
    Strip z = strip(v, n);
    for (long j = 0; j < REGISTERS; ++j) z.of[j] = z.of[j] / alpha;
    return z;
}

template <class T>
void nearest_block(const T* v, float alpha, const Levels& levels, T* out, long size) {
    levels.search([=](const auto nearest_of) {
        for_strips(size, [&](long i, long n) {
            IntStrip index;
            Strip q = nearest_of(in_units(v + i, alpha, n), index);
            for (long j = 0; j < REGISTERS; ++j) q.of[j] = q.of[j] * alpha;
            put_strip(out + i, q, n);
        });
    });
}

// Gradients to a block of values; returns its part of the gradient to alpha.
template <class T>
float nearest_slopes(const T* v, const T* upstream, float alpha, const Levels& levels, T* grad_v,
                     long size) {
    return levels.search([=](const auto nearest_of) {
        floats sum = {};
        for_strips(size, [&](long i, long n) {
            IntStrip index;
            const Strip z = in_units(v + i, alpha, n), q = nearest_of(z, index);
            Strip r = strip(upstream + i, n);
            for (long j = 0; j < REGISTERS; ++j) {
                const ints is_outside = (z.of[j] > 1.0f) | (z.of[j] < -1.0f);
                sum += (q.of[j] - (is_outside ? floats{} : z.of[j])) * r.of[j];
                r.of[j] = is_outside ? floats{} : r.of[j];
            }
            put_strip(grad_v + i, r, n);
        });
        return sum_of(sum);
    });
}

// ---- ADQ's codebook [Jia2025] ----

// The nearest levels; to sums by level are added weights less their level, and 1 for each.
template <class T>
void codebook_block(const T* w, const Levels& levels, T* out, IntervalSums& sums, long size) {
    levels.search([=, &sums](const auto nearest_of) {
        IntervalSums::Addends found;
        for_strips(size, [&](long i, long n) {
            IntStrip index;
            const Strip own = strip(w + i, n), q = nearest_of(own, index);
            put_strip(out + i, q, n);
            for (long j = 0; j < REGISTERS; ++j) {
                // NaN lies in no interval.
                const ints interval = own.of[j] == own.of[j] ? index.of[j] + 1 : ints{};
                found.set(j, own.of[j] - q.of[j], 1.0f + floats{}, interval);
            }
            sums.add(found, n);
        });
    });
}

// ---- N2UQ: [Liu2022] Eqs. 8-10 ----

// Levels and indices.
template <class T>
void thresholds_block(const T* x, float beta, const Cuts& cuts, float d, float n_min, T* out,
                      uint8_t* index, long size) {
    for_strips(size, [&](long i, long n) {
        Strip z = strip(x + i, n);
        for (long j = 0; j < REGISTERS; ++j) z.of[j] = z.of[j] * beta;
        const IntStrip below = cuts.below(z);
        for (long j = 0; j < REGISTERS; ++j) {
            const floats level = (__builtin_convertvector(below.of[j], floats) + n_min) * d;
            z.of[j] = z.of[j] == z.of[j] ? level : z.of[j];
        }
        put_strip(out + i, z, n);
        put_strip(index + i, below, n);
    });
}

template <class T>
void equidistant_block(const T* __restrict x, const uint8_t* __restrict index, float d, float n,
                       T* __restrict out, long size) {
#pragma omp simd
    for (long i = 0; i < size; ++i) {
        const float value = load(x, i), level = (static_cast<float>(index[i]) + n) * d;
        store(out, i, value == value ? level : value);
    }
}

// What the backward pass knows of n intervals.
struct Intervals {
    const float *knots, *slopes;
    long n;
    float beta, qmin;
};

// Gradients to a block of values. To sums by interval are added upstream gradients, and those times
// the distance from the interval's left end; returns upstream gradients times codes.
template <class T>
float interval_slopes(const Intervals& known, const T* x, const T* upstream, const uint8_t* index,
                      T* grad_x, IntervalSums& sums, long size) {
    const auto pass = [=, &sums](const auto knots, const auto slopes) {
        const int32_t last = static_cast<int32_t>(known.n - 1);
        floats codes = {};
        IntervalSums::Addends found;
        for_strips(size, [&](long i, long n) {
            const Strip value = strip(x + i, n), r = strip(upstream + i, n);
            const IntStrip above = strip(index + i, n);
            Strip grad;
            for (long j = 0; j < REGISTERS; ++j) {
                // Threshold k lies within interval k: `index` knots lie below, or one more.
                const ints at_least = above.of[j] < last ? above.of[j] : last + ints{};
                const floats z = value.of[j] * known.beta;
                const ints below = at_least - (z > knots.at(at_least)), own = below + (below > 0);
                const floats slope = below > 0 ? slopes.at(own) : floats{};
                const floats code = __builtin_convertvector(above.of[j], floats) + known.qmin;
                grad.of[j] = r.of[j] * slope;
                found.set(j, r.of[j], r.of[j] * (z - knots.at(own)), below);
                codes += r.of[j] * code;
            }
            put_strip(grad_x + i, grad, n);
            sums.add(found, n);
        });
        return sum_of(codes);
    };
    return with_tables(known.n, pass, known.knots, known.slopes);
}

}  // namespace
