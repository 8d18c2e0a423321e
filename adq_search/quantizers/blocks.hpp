// The quantizers' arithmetic on blocks of values, forward and backward.
//
// It is that of the tensor operations in `_through.py`, `_thresholds.py` and `_nearest.py`, operation
// by operation, so that outputs are equal to the last bit (build without contraction of products and
// sums).

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "lanes.hpp"
#include "native.hpp"

namespace {

constexpr long BLOCK = 4096;
// Tables that neighbouring values are added to in turn, so that no sum waits for the one before.
constexpr long N_TABLES = 8;
// Values that are compared with all cuts at once.
constexpr long STRIP = 4 * LANES;
// Room for values of which the last strip may not be full.
constexpr long strips(long size) { return (size + STRIP - 1) / STRIP * STRIP; }
// Up to this many intervals, comparing with each is faster than adding value by value.
constexpr long FEW_INTERVALS = 32;
// Up to this many cuts, comparing with each is faster than searching: only some processors look up
// in a register.
#ifdef __AVX512F__
constexpr long FEW_CUTS = 7;
#else
constexpr long FEW_CUTS = 127;
#endif

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
    float n, p, low, high, per_step;

    Grid(float s, float n, float p) : n(n), p(p), low(n * s), high(p * s), per_step(1.0f / s) {}
};

// Of a value, the part of its gradient to the step.
template <class V>
inline V step_part(const Grid grid, V value, V upstream) {
    const V z = clip(value * grid.per_step, grid.n, grid.p);
    return (nearest(z) - within(value, grid.low, grid.high, z)) * upstream;
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

// ---- Sorted levels and cuts ----

// Entries of a table.
inline floats looked_up(const float* table, ints index) {
#ifdef __AVX512F__
    return reinterpret_cast<floats>(
        _mm512_i32gather_ps(reinterpret_cast<__m512i>(index), table, sizeof(float)));
#else
    floats found;
    for (long i = 0; i < LANES; ++i) found[i] = table[index[i]];
    return found;
#endif
}

// A table of figures, looked up for many values at once.
class Lookup {
  public:
    Lookup(const float* table, long n) : table_(table), is_few_(n <= LANES) {
        if (is_few_) std::memcpy(&few_, table, n * sizeof(float));
    }
    floats at(ints index) const {
        return is_few_ ? __builtin_shuffle(few_, index) : looked_up(table_, index);
    }

  private:
    const float* table_;
    bool is_few_;
    floats few_ = {};
};

// Sorted cuts. Values are compared with each of a few; of many, with one a level of a search tree.
class Cuts {
  public:
    explicit Cuts(std::vector<float> sorted) : sorted_(std::move(sorted)) {
        const long n = static_cast<long>(sorted_.size());
        if (n <= FEW_CUTS) return;
        while ((1L << depth_) - 1 < n) ++depth_;
        // Level d has 2^d nodes; node i lies where it divides what the levels above leave.
        for (long d = 0; d < depth_; ++d) {
            for (long i = 0; i < 1L << d; ++i) {
                const long at = ((2 * i + 1) << (depth_ - 1 - d)) - 1;
                nodes_.push_back(at < n ? sorted_[at] : INFINITY);
            }
            if (d < NEAR) std::memcpy(&near_[d], level(d), sizeof(float) << d);
        }
    }

    // How many lie below each of STRIP values, which stay in registers; none for NaN.
    void below(const floats* z, ints* count) const {
        for (long j = 0; j < STRIP / LANES; ++j) count[j] = ints{};
        if (depth_ == 0) {
            for (const float cut : sorted_)
                for (long j = 0; j < STRIP / LANES; ++j) count[j] -= z[j] > cut;
            return;
        }
        for (long d = 0; d < depth_ && d < NEAR; ++d)
            for (long j = 0; j < STRIP / LANES; ++j)
                count[j] = count[j] + count[j] - (z[j] > __builtin_shuffle(near_[d], count[j]));
        for (long d = NEAR; d < depth_; ++d)
            for (long j = 0; j < STRIP / LANES; ++j)
                count[j] = count[j] + count[j] - (z[j] > looked_up(level(d), count[j]));
    }

    // The same for a buffer that holds whole strips.
    void below(const float* z, int32_t* count, long size) const {
        for (long begin = 0; begin < size; begin += STRIP) {
            floats value[STRIP / LANES];
            ints found[STRIP / LANES];
            std::memcpy(value, z + begin, sizeof value);
            below(value, found);
            std::memcpy(count + begin, found, sizeof found);
        }
    }

    long size() const { return static_cast<long>(sorted_.size()); }

  private:
    // Levels whose nodes stay in a register each.
    static constexpr long NEAR = 5;

    const float* level(long d) const { return nodes_.data() + (1L << d) - 1; }

    std::vector<float> sorted_, nodes_;
    long depth_ = 0;
    floats near_[NEAR] = {};
};

// Tables of sums by interval; neighbouring values go to different ones.
class Tables {
  public:
    explicit Tables(long n) : n_(n), sums_(N_TABLES * n, 0.0f) {}
    void add(long i, long k, float value) { sums_[(i % N_TABLES) * n_ + k] += value; }
    void total(float* to) const {
        for (long k = 0; k < n_; ++k) {
            float sum = 0.0f;
            for (long t = 0; t < N_TABLES; ++t) sum += sums_[t * n_ + k];
            to[k] = sum;
        }
    }

  private:
    long n_;
    std::vector<float> sums_;
};

// Add values to a sum where `own` is `k`, in one operation where the processor has it.
inline void add_where(ints own, int32_t k, floats value, floats& sum) {
#ifdef __AVX512F__
    const __mmask16 is_there =
        _mm512_cmpeq_epi32_mask(reinterpret_cast<__m512i>(own), _mm512_set1_epi32(k));
    const __m512 before = reinterpret_cast<__m512>(sum);
    sum = reinterpret_cast<floats>(
        _mm512_mask_add_ps(before, is_there, before, reinterpret_cast<__m512>(value)));
#else
    sum += own == k ? value : floats{};
#endif
}

// Sums of two figures over the values of each interval 1..n. Buffers that are added hold whole
// strips, with interval 0 beyond `size`.
class IntervalSums {
  public:
    explicit IntervalSums(long n)
        : n_(n), few_(n <= FEW_INTERVALS ? 2 * (n + TOGETHER - 1) / TOGETHER * TOGETHER : 0),
          many_(n <= FEW_INTERVALS ? 0 : 2 * n) {}

    void add(const float* first, const float* second, const int32_t* interval, long size) {
        if (few_.empty()) {
            for (long i = 0; i < size; ++i) {
                if (interval[i] == 0) continue;
                many_.add(i, interval[i] - 1, first[i]);
                many_.add(i, n_ + interval[i] - 1, second[i]);
            }
            return;
        }
        // As many sums at a time as stay in registers.
        for (int32_t k = 0; k < n_; k += TOGETHER) {
            floats sums[2 * TOGETHER];
#pragma GCC unroll 16
            for (int32_t j = 0; j < 2 * TOGETHER; ++j) sums[j] = few_[2 * k + j];
            for (long i = 0; i < size; i += LANES) {
                floats one, two;
                ints own;
                std::memcpy(&one, first + i, sizeof one);
                std::memcpy(&two, second + i, sizeof two);
                std::memcpy(&own, interval + i, sizeof own);
#pragma GCC unroll 8
                for (int32_t j = 0; j < TOGETHER; ++j) {
                    add_where(own, k + j + 1, one, sums[2 * j]);
                    add_where(own, k + j + 1, two, sums[2 * j + 1]);
                }
            }
#pragma GCC unroll 16
            for (int32_t j = 0; j < 2 * TOGETHER; ++j) few_[2 * k + j] = sums[j];
        }
    }

    // The first figure's sums, then the second's, # shape: (2, n).
    void total(float* sums) const {
        if (few_.empty()) return many_.total(sums);
        for (long k = 0; k < n_; ++k) {
            sums[k] = sum_of(few_[2 * k]);
            sums[n_ + k] = sum_of(few_[2 * k + 1]);
        }
    }

  private:
    static constexpr int32_t TOGETHER = 8;

    long n_;
    std::vector<floats> few_;
    Tables many_;
};

// The same of one buffer.
void sums_by_interval(const float* first, const float* second, const int32_t* interval, long n,
                      float* to, long size) {
    IntervalSums sums(n);
    sums.add(first, second, interval, size);
    sums.total(to);
}

// Midpoints between sorted levels.
Cuts between(const float* levels, long n_levels) {
    std::vector<float> cuts(n_levels - 1);
    for (long k = 0; k + 1 < n_levels; ++k) cuts[k] = (levels[k + 1] + levels[k]) / 2;
    return Cuts(std::move(cuts));
}

// Sum tables of blocks: # shape: (blocks, n) to (n,).
void total_of(const std::vector<float>& parts, long n, float* sums) {
    std::vector<double> total(n);
    for (size_t begin = 0; begin < parts.size(); begin += n)
        for (long k = 0; k < n; ++k) total[k] += parts[begin + k];
    for (long k = 0; k < n; ++k) sums[k] = static_cast<float>(total[k]);
}

// ---- POT, POST and root-r: [Zhou2025] Eqs. 3 and 17 ----

// Values in units of alpha, the nearest level of each and its index; NaN stays.
template <class T>
void nearest_block(const T* __restrict v, float alpha, const float* levels,
                   const Cuts& cuts, float* __restrict z, float* __restrict q,
                   int32_t* __restrict index, long size) {
#pragma omp simd
    for (long i = 0; i < size; ++i) z[i] = load(v, i) / alpha;
    cuts.below(z, index, size);
    for (long i = 0; i < size; ++i) q[i] = z[i] == z[i] ? levels[index[i]] : z[i];
}

template <class T>
void scaled_block(const float* __restrict q, float alpha, T* __restrict out, long size) {
#pragma omp simd
    for (long i = 0; i < size; ++i) store(out, i, q[i] * alpha);
}

template <class T>
float clipped_slopes(const float* __restrict z, const float* __restrict q,
                     const T* __restrict upstream, T* __restrict grad_v, long size) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < size; ++i) {
        const float r = load(upstream, i);
        const bool outside = std::fabs(z[i]) > 1.0f;
        store(grad_v, i, outside ? 0.0f : r);
        sum += (q[i] - (outside ? 0.0f : z[i])) * r;
    }
    return sum;
}

// ---- N2UQ: [Liu2022] Eqs. 8-10 ----

// Levels and indices of STRIP values.
template <class T>
void thresholds_strip(const T* __restrict x, float beta, const Cuts& cuts, float d,
                      float n, T* __restrict out, uint8_t* __restrict index) {
    floats z[STRIP / LANES];
    ints below[STRIP / LANES];
    for (long j = 0; j < STRIP / LANES; ++j) z[j] = lanes(x + j * LANES) * beta;
    cuts.below(z, below);
    for (long j = 0; j < STRIP / LANES; ++j) {
        const floats level = (__builtin_convertvector(below[j], floats) + n) * d;
        put(out + j * LANES, z[j] == z[j] ? level : z[j]);
        narrow(index + j * LANES, below[j]);
    }
}

template <class T>
void thresholds_block(const T* x, float beta, const Cuts& cuts, float d, float n,
                      T* out, uint8_t* index, long size) {
    long i = 0;
    for (; i + STRIP <= size; i += STRIP)
        thresholds_strip(x + i, beta, cuts, d, n, out + i, index + i);
    if (i == size) return;
    T last[STRIP] = {}, levels[STRIP];
    uint8_t indices[STRIP];
    std::memcpy(last, x + i, (size - i) * sizeof(T));
    thresholds_strip(last, beta, cuts, d, n, levels, indices);
    std::memcpy(out + i, levels, (size - i) * sizeof(T));
    std::memcpy(index + i, indices, size - i);
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

// What the backward pass knows of the intervals.
struct Intervals {
    Lookup knots, slopes;
    int32_t last;
    float beta, n;
};

// Gradients to LANES values; their upstream gradients, those times the distance from the left end of
// the interval, and the interval (0 below the first knot). Returns upstream gradients times codes.
template <class T>
inline floats interval_lanes(const Intervals& known, const T* x, const T* upstream,
                             const uint8_t* index, T* grad_x, float* r, float* moment,
                             int32_t* interval) {
    const ints above = widened(index);
    // Threshold i lies within interval i: `index` knots lie below, or one more.
    const ints at_least = above < known.last ? above : known.last + ints{};
    const floats z = lanes(x) * known.beta, gradient = lanes(upstream);
    const ints below = at_least - (z > known.knots.at(at_least));
    const ints own = below + (below > 0);
    const floats reach = gradient * (z - known.knots.at(own));
    put(grad_x, gradient * (below > 0 ? known.slopes.at(own) : floats{}));
    std::memcpy(r, &gradient, sizeof gradient);
    std::memcpy(moment, &reach, sizeof reach);
    std::memcpy(interval, &below, sizeof below);
    return gradient * (__builtin_convertvector(above, floats) + known.n);
}

template <class T>
float interval_slopes(const Intervals& known, const T* x, const T* upstream, const uint8_t* index,
                      T* grad_x, float* r, float* moment, int32_t* interval, long size) {
    floats codes = {};
    long i = 0;
    for (; i + LANES <= size; i += LANES)
        codes += interval_lanes(known, x + i, upstream + i, index + i, grad_x + i, r + i, moment + i,
                                interval + i);
    if (i < size) {
        T last_x[LANES] = {}, last_upstream[LANES] = {}, last_grad[LANES];
        uint8_t last_index[LANES] = {};
        std::memcpy(last_x, x + i, (size - i) * sizeof(T));
        std::memcpy(last_upstream, upstream + i, (size - i) * sizeof(T));
        std::memcpy(last_index, index + i, size - i);
        codes += interval_lanes(known, last_x, last_upstream, last_index, last_grad, r + i,
                                moment + i, interval + i);
        std::memcpy(grad_x + i, last_grad, (size - i) * sizeof(T));
    }
    for (i = size; i % STRIP != 0; ++i) interval[i] = 0;
    return sum_of(codes);
}

}  // namespace
