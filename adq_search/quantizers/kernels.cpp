// Forward and backward passes of the quantizers, one pass over memory each; called by `_native.py`.
//
// A tensor comes as rows: the values of one row share a step. Arithmetic is that of the tensor
// operations in `_through.py`, `_thresholds.py` and `_nearest.py`, operation by operation, so that
// outputs are equal to the last bit (build without contraction of products and sums). Sums are taken
// in blocks of fixed size, so that they do not depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr long BLOCK = 4096;
// With fewer values a second thread costs more than it brings.
constexpr long VALUES_WORTH_THREADS = 32768;
// Tables that neighbouring values are added to in turn, so that no sum waits for the one before.
constexpr long N_TABLES = 8;
// Vectors of the compiler's own arithmetic: 16 values, in whatever registers the processor has.
constexpr long LANES = 16;
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));
// Values that are compared with all cuts at once.
constexpr long STRIP = 4 * LANES;
// Up to this many intervals, comparing with each is faster than adding value by value.
constexpr long FEW_INTERVALS = 32;

struct bfloat16 {
    uint16_t bits;
};

inline float load(const float* from, long i) { return from[i]; }
inline void store(float* to, long i, float value) { to[i] = value; }

inline float load(const bfloat16* from, long i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(bfloat16* to, long i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t to_nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to[i].bits = static_cast<uint16_t>(value != value ? 0x7fc0u : to_nearest_even);
}

template <class T>
inline floats lanes(const T* from) {
    floats values;
    for (long j = 0; j < LANES; ++j) values[j] = load(from, j);
    return values;
}

template <class T>
inline void put(T* to, floats values) {
    for (long j = 0; j < LANES; ++j) store(to, j, values[j]);
}

// Halves are added to each other: no addition waits for fifteen others.
inline float sum_of(floats values) {
    for (long width = LANES / 2; width > 0; width /= 2)
        for (long j = 0; j < width; ++j) values[j] += values[j + width];
    return values[0];
}

// The step in use: `positive_step` of `_through.py`.
inline float positive(float raw, float smallest) {
    const float magnitude = std::fabs(raw);
    return magnitude < smallest ? smallest : magnitude;
}

inline float clip(float z, float low, float high) {
    z = z < low ? low : z;
    return z > high ? high : z;
}

inline long blocks_of(long n) { return (n + BLOCK - 1) / BLOCK; }

// Call `work(block, row, begin, size)` for blocks of values, each within one row.
template <class Work>
void for_blocks(long rows, long columns, long threads, const Work work) {
    const long in_row = blocks_of(columns);
    if (rows * columns < VALUES_WORTH_THREADS) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long block = 0; block < rows * in_row; ++block) {
        const long row = block / in_row, offset = (block % in_row) * BLOCK;
        const long rest = columns - offset;
        work(block, row, row * columns + offset, rest < BLOCK ? rest : BLOCK);
    }
}

// Sum what the blocks found to one figure a row, times `scale` with the sign of a row's own step.
void sum_rows(const std::vector<float>& parts, long rows, long by_row, const float* raw, float scale,
              float* sums) {
    const long in_row = static_cast<long>(parts.size()) / rows;
    for (long row = 0; row < rows; ++row) {
        double sum = 0.0;
        for (long i = 0; i < in_row; ++i) sum += parts[row * in_row + i];
        sums[row] = static_cast<float>(sum) * (by_row && raw[row] < 0.0f ? -scale : scale);
    }
}

// ---- LSQ and ASQ: [Esser2020] Eqs. 1-3 and 5, [Zhou2025] Eqs. 5-7 ----

template <class T>
void uniform_block(const T* __restrict v, float s, float n, float p, T* __restrict out, long size) {
#pragma omp simd
    for (long i = 0; i < size; ++i)
        store(out, i, std::nearbyint(clip(load(v, i) / s, n, p)) * s);
}

// Returns the block's part of the gradient to the step. Divisions would take as long as memory does:
// a product is exact enough here, where no code depends on the last bit.
template <class T>
float uniform_slopes(const T* __restrict v, const T* __restrict upstream, float s, float n, float p,
                     T* __restrict grad_v, long size) {
    const float low = n * s, high = p * s, per_step = 1.0f / s;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < size; ++i) {
        const float r = load(upstream, i), value = load(v, i);
        const float z = clip(value * per_step, n, p);
        const float inside = (value > low) & (value < high) ? 1.0f : 0.0f;
        store(grad_v, i, r * inside);
        sum += (std::nearbyint(z) - inside * z) * r;
    }
    return sum;
}

// ---- Sorted levels and cuts ----

// How many cuts lie below each of STRIP values, which stay in registers; none for NaN.
inline void rank_strip(const floats* z, const std::vector<float>& cuts, ints* below) {
    for (long j = 0; j < STRIP / LANES; ++j) below[j] = ints{};
    for (const float cut : cuts)
        for (long j = 0; j < STRIP / LANES; ++j) below[j] -= z[j] > cut;
}

// The same for a buffer that holds whole strips.
void rank(const float* z, const std::vector<float>& cuts, int32_t* below, long size) {
    for (long begin = 0; begin < size; begin += STRIP) {
        floats value[STRIP / LANES];
        ints count[STRIP / LANES];
        std::memcpy(value, z + begin, sizeof value);
        rank_strip(value, cuts, count);
        std::memcpy(below + begin, count, sizeof count);
    }
}

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

// Sums of two figures over the values of each interval 1..n; `sums` # shape: (2, n). Buffers hold
// whole strips, with interval 0 beyond `size`.
void sums_by_interval(const float* first, const float* second, const int32_t* interval, long n,
                      float* sums, long size) {
    if (n <= FEW_INTERVALS) {
        for (int32_t k = 0; k < n; ++k) {
            // Four sums at a time: none waits for the one before.
            floats total[2][STRIP / LANES] = {};
            for (long i = 0; i < size; i += STRIP) {
                for (long j = 0; j < STRIP / LANES; ++j) {
                    floats one, two;
                    ints own;
                    std::memcpy(&one, first + i + j * LANES, sizeof one);
                    std::memcpy(&two, second + i + j * LANES, sizeof two);
                    std::memcpy(&own, interval + i + j * LANES, sizeof own);
                    total[0][j] += own == k + 1 ? one : floats{};
                    total[1][j] += own == k + 1 ? two : floats{};
                }
            }
            sums[k] = sum_of((total[0][0] + total[0][1]) + (total[0][2] + total[0][3]));
            sums[n + k] = sum_of((total[1][0] + total[1][1]) + (total[1][2] + total[1][3]));
        }
        return;
    }
    Tables tables(2 * n);
    for (long i = 0; i < size; ++i) {
        if (interval[i] == 0) continue;
        tables.add(i, interval[i] - 1, first[i]);
        tables.add(i, n + interval[i] - 1, second[i]);
    }
    tables.total(sums);
}

// Midpoints between sorted levels.
std::vector<float> between(const float* levels, long n_levels) {
    std::vector<float> cuts(n_levels - 1);
    for (long k = 0; k + 1 < n_levels; ++k) cuts[k] = (levels[k + 1] + levels[k]) / 2;
    return cuts;
}

// Sum tables of blocks: # shape: (blocks, n) to (n,).
void total_of(const std::vector<float>& parts, long n, float* sums) {
    for (long k = 0; k < n; ++k) {
        double sum = 0.0;
        for (size_t i = k; i < parts.size(); i += n) sum += parts[i];
        sums[k] = static_cast<float>(sum);
    }
}

// ---- POT, POST and root-r: [Zhou2025] Eqs. 3 and 17 ----

// Values in units of alpha, the nearest level of each and its index; NaN stays.
template <class T>
void nearest_block(const T* __restrict v, float alpha, const float* levels,
                   const std::vector<float>& cuts, float* __restrict z, float* __restrict q,
                   int32_t* __restrict index, long size) {
#pragma omp simd
    for (long i = 0; i < size; ++i) z[i] = load(v, i) / alpha;
    rank(z, cuts, index, size);
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
void thresholds_strip(const T* __restrict x, float beta, const std::vector<float>& cuts, float d,
                      float n, T* __restrict out, uint8_t* __restrict index) {
    floats z[STRIP / LANES];
    ints below[STRIP / LANES];
    for (long j = 0; j < STRIP / LANES; ++j) z[j] = lanes(x + j * LANES) * beta;
    rank_strip(z, cuts, below);
    for (long j = 0; j < STRIP / LANES; ++j) {
        const floats level = (__builtin_convertvector(below[j], floats) + n) * d;
        put(out + j * LANES, z[j] == z[j] ? level : z[j]);
        const bytes narrow = __builtin_convertvector(below[j], bytes);
        std::memcpy(index + j * LANES, &narrow, sizeof narrow);
    }
}

template <class T>
void thresholds_block(const T* x, float beta, const std::vector<float>& cuts, float d, float n,
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

// A table of figures by interval, looked up for many values at once.
class Lookup {
  public:
    Lookup(const float* table, long n) : table_(table), is_few_(n <= LANES) {
        if (is_few_) std::memcpy(&few_, table, n * sizeof(float));
    }
    floats at(ints index) const {
        if (is_few_) return __builtin_shuffle(few_, index);
        floats found;
        for (long i = 0; i < LANES; ++i) found[i] = table_[index[i]];
        return found;
    }

  private:
    const float* table_;
    bool is_few_;
    floats few_ = {};
};

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
    bytes narrow;
    std::memcpy(&narrow, index, sizeof narrow);
    const ints above = __builtin_convertvector(narrow, ints);
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

// Run `use` with a value of the tensor's type.
template <class Use>
void typed(long is_half, const Use use) {
    if (is_half)
        use(bfloat16{});
    else
        use(float{});
}

}  // namespace

// What Python calls. Values, upstream gradients, outputs and gradients to values are float32, or
// bfloat16 where `half`; all else is float32. `by_row` and `ranged`: one parameter, or one range,
// for each row; else one in all.

extern "C" void uniform(long half, const void* values, const float* raw, long by_row, float smallest,
                        const float* qmin, const float* qmax, long ranged, void* out, long rows,
                        long columns, long threads) {
    typed(half, [=](auto kind) {
        using T = decltype(kind);
        const T* v = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        for_blocks(rows, columns, threads, [=](long, long row, long at, long size) {
            const float s = positive(raw[by_row ? row : 0], smallest);
            const long range = ranged ? row : 0;
            uniform_block(v + at, s, qmin[range], qmax[range], to + at, size);
        });
    });
}

extern "C" void uniform_backward(long half, const void* values, const void* upstream,
                                 const float* raw, long by_row, float smallest, const float* qmin,
                                 const float* qmax, long ranged, float scale, void* grad_values,
                                 float* sums, long rows, long columns, long threads) {
    std::vector<float> parts(rows * blocks_of(columns));
    float* part = parts.data();
    typed(half, [=](auto kind) {
        using T = decltype(kind);
        const T *v = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        T* to = static_cast<T*>(grad_values);
        for_blocks(rows, columns, threads, [=](long block, long row, long at, long size) {
            const float s = positive(raw[by_row ? row : 0], smallest);
            const long range = ranged ? row : 0;
            part[block] =
                uniform_slopes(v + at, r + at, s, qmin[range], qmax[range], to + at, size);
        });
    });
    sum_rows(parts, rows, by_row, raw, scale, sums);
}

extern "C" void clipped(long half, const void* values, const float* raw, long by_row, float smallest,
                        const float* levels, long n_levels, void* out, long rows, long columns,
                        long threads) {
    const std::vector<float> cuts = between(levels, n_levels);
    typed(half, [=, &cuts](auto kind) {
        using T = decltype(kind);
        const T* v = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        for_blocks(rows, columns, threads, [=, &cuts](long, long row, long at, long size) {
            float z[BLOCK], q[BLOCK];
            int32_t index[BLOCK];
            const float alpha = positive(raw[by_row ? row : 0], smallest);
            nearest_block(v + at, alpha, levels, cuts, z, q, index, size);
            scaled_block(q, alpha, to + at, size);
        });
    });
}

extern "C" void clipped_backward(long half, const void* values, const void* upstream,
                                 const float* raw, long by_row, float smallest, const float* levels,
                                 long n_levels, float scale, void* grad_values, float* sums,
                                 long rows, long columns, long threads) {
    std::vector<float> parts(rows * blocks_of(columns));
    float* part = parts.data();
    const std::vector<float> cuts = between(levels, n_levels);
    typed(half, [=, &cuts](auto kind) {
        using T = decltype(kind);
        const T *v = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        T* to = static_cast<T*>(grad_values);
        for_blocks(rows, columns, threads, [=, &cuts](long block, long row, long at, long size) {
            float z[BLOCK], q[BLOCK];
            int32_t index[BLOCK];
            const float alpha = positive(raw[by_row ? row : 0], smallest);
            nearest_block(v + at, alpha, levels, cuts, z, q, index, size);
            part[block] = clipped_slopes(z, q, r + at, to + at, size);
        });
    });
    sum_rows(parts, rows, by_row, raw, scale, sums);
}

// `sums`: by level, the sum of weights less their level, and how many weights there are.
extern "C" void codebook(long half, const void* weights, const float* levels, long n_levels,
                         void* out, float* sums, long n_values, long threads) {
    const long n_sums = 2 * n_levels;
    std::vector<float> parts(n_sums * blocks_of(n_values));
    float* part = parts.data();
    const std::vector<float> cuts = between(levels, n_levels);
    typed(half, [=, &cuts](auto kind) {
        using T = decltype(kind);
        const T* w = static_cast<const T*>(weights);
        T* to = static_cast<T*>(out);
        for_blocks(1, n_values, threads, [=, &cuts](long block, long, long at, long size) {
            float z[BLOCK], q[BLOCK];
            int32_t index[BLOCK];
            nearest_block(w + at, 1.0f, levels, cuts, z, q, index, size);
            scaled_block(q, 1.0f, to + at, size);
            float error[BLOCK], one[BLOCK];
            int32_t interval[BLOCK];
            for (long i = 0; i < size; ++i) {
                error[i] = z[i] - q[i];
                one[i] = 1.0f;
                interval[i] = z[i] == z[i] ? index[i] + 1 : 0;
            }
            for (long i = size; i % STRIP != 0; ++i) interval[i] = 0;
            sums_by_interval(error, one, interval, n_levels, part + n_sums * block, size);
        });
    });
    total_of(parts, n_sums, sums);
}

// `index`: how many cuts lie below each value.
extern "C" void thresholds(long half, const void* values, const float* in_scale, const float* cuts,
                           long n_cuts, const float* step, const float* qmin, void* out,
                           uint8_t* index, long n_values, long threads) {
    const float beta = *in_scale, d = *step, n = *qmin;
    const std::vector<float> sorted(cuts, cuts + n_cuts);
    typed(half, [=, &sorted](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        for_blocks(1, n_values, threads, [=, &sorted](long, long, long at, long size) {
            thresholds_block(x + at, beta, sorted, d, n, to + at, index + at, size);
        });
    });
}

extern "C" void thresholds_again(long half, const void* values, const uint8_t* index,
                                 const float* step, const float* qmin, void* out, long n_values,
                                 long threads) {
    const float d = *step, n = *qmin;
    typed(half, [=](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        for_blocks(1, n_values, threads, [=](long, long, long at, long size) {
            equidistant_block(x + at, index + at, d, n, to + at, size);
        });
    });
}

// Entry k of the tables belongs to the interval right of knot k. `sums`: by interval, the sum of
// upstream gradients, and of those times the distance from the interval's left end; last, the sum of
// upstream gradients times codes.
extern "C" void thresholds_backward(long half, const void* values, const void* upstream,
                                    const uint8_t* index, const float* in_scale, const float* knots,
                                    const float* slopes, long n_knots, const float* qmin,
                                    void* grad_values, float* sums, long n_values, long threads) {
    const Intervals known = {Lookup(knots, n_knots), Lookup(slopes, n_knots),
                             static_cast<int32_t>(n_knots - 1), *in_scale, *qmin};
    const long n_sums = 2 * n_knots + 1;
    std::vector<float> parts(n_sums * blocks_of(n_values));
    float* part = parts.data();
    typed(half, [=, &known](auto kind) {
        using T = decltype(kind);
        const T *x = static_cast<const T*>(values), *gradient = static_cast<const T*>(upstream);
        T* to = static_cast<T*>(grad_values);
        for_blocks(1, n_values, threads, [=, &known](long block, long, long at, long size) {
            float r[BLOCK], moment[BLOCK];
            int32_t interval[BLOCK];
            float* own = part + n_sums * block;
            own[n_sums - 1] = interval_slopes(known, x + at, gradient + at, index + at, to + at, r,
                                              moment, interval, size);
            sums_by_interval(r, moment, interval, n_knots, own, size);
        });
    });
    total_of(parts, n_sums, sums);
}
