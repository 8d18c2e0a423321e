// Forward and backward passes of the quantizers, one pass over memory each; called by `_native.py`.
//
// A tensor comes as rows: the values of one row share a step. Sums are taken in blocks of fixed size,
// so that they do not depend on the number of threads.

#include "adapter.hpp"
#include "blocks.hpp"
#include "intervals.hpp"
#include "lines.hpp"

namespace {

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

// Sum what the blocks found to the gradient of each row's own step, or of the one that all share,
// times `scale`, with the step's sign.
void sum_rows(const std::vector<float>& parts, long rows, long by_row, const float* raw, float scale,
              float* gradients) {
    const long n = by_row ? rows : 1, in_one = static_cast<long>(parts.size()) / n;
    for (long k = 0; k < n; ++k) {
        double sum = 0.0;
        for (long i = 0; i < in_one; ++i) sum += parts[k * in_one + i];
        gradients[k] = static_cast<float>(sum) * (raw[k] < 0.0f ? -scale : scale);
    }
}

template <class T>
void clip_block(const T* v, float low, float high, T* out, long size) {
    for_values(size, [=](long i, auto kind) { set(out, i, clip(at(v, i, kind), low, high)); });
}

// Gradients through uniform quantization, and shares of the place in the line.
template <class T>
void shared_line(const Grid grid, const T* y, const T* upstream, const float* share, T* grad,
                 long size) {
    for_values(size, [=](long j, auto kind) {
        const auto r = within(at(y, j, kind), grid.low, grid.high, at(upstream, j, kind));
        set(grad, j, r + at(share, j, kind));
    });
}

// Add the gradient that reaches clipped values by another way, and let both through the clipping.
template <class T>
void join_block(const T* v, const T* beside, float low, float high, T* grad, long size) {
    for_values(size, [=](long i, auto kind) {
        const auto both = at(grad, i, kind) + at(beside, i, kind);
        set(grad, i, within(at(v, i, kind), low, high, both));
    });
}

}  // namespace

// What Python calls. Values, upstream gradients, outputs and gradients to values are float32, or
// bfloat16 where `half`; all else is float32. `by_row` and `ranged`: one parameter, or one range,
// for each row; else one in all. Values with gradients `beside` are what a clipping to [low, high]
// returned; those to its input are found. Null where there is no clipping.

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

// The same behind a clipping, by one step; what is clipped goes to `clipped`.
extern "C" void rectified_uniform(long half, const void* values, float low, float high,
                                  const float* raw, float smallest, const float* qmin,
                                  const float* qmax, void* clipped, void* out, long rows,
                                  long columns, long threads) {
    const float s = positive(*raw, smallest), n = *qmin, p = *qmax;
    typed(half, [=](auto kind) {
        using T = decltype(kind);
        const T* v = static_cast<const T*>(values);
        T *y = static_cast<T*>(clipped), *to = static_cast<T*>(out);
        for_blocks(rows, columns, threads, [=](long, long, long at, long size) {
            clip_block(v + at, low, high, y + at, size);
            uniform_block(y + at, s, n, p, to + at, size);
        });
    });
}

// By how much the output of each value changes with the step.
extern "C" void step_slopes(long half, const void* values, const float* raw, float smallest,
                            const float* qmin, const float* qmax, void* out, long n_values,
                            long threads) {
    const Grid grid(positive(*raw, smallest), *qmin, *qmax);
    typed(half, [=](auto kind) {
        using T = decltype(kind);
        const T* v = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        for_blocks(1, n_values, threads, [=](long, long, long first, long size) {
            for_values(size, [=](long i, auto kind) {
                set(to + first, i, slope_by_step(grid, at(v + first, i, kind)));
            });
        });
    });
}

extern "C" void uniform_backward(long half, const void* values, const void* upstream,
                                 const float* raw, long by_row, float smallest, const float* qmin,
                                 const float* qmax, long ranged, float scale, const void* beside,
                                 float low, float high, void* grad_values, float* sums, long rows,
                                 long columns, long threads) {
    std::vector<float> parts(rows * blocks_of(columns));
    float* part = parts.data();
    typed(half, [=](auto kind) {
        using T = decltype(kind);
        const T *v = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        const T* other = static_cast<const T*>(beside);
        T* to = static_cast<T*>(grad_values);
        for_blocks(rows, columns, threads, [=](long block, long row, long at, long size) {
            const float s = positive(raw[by_row ? row : 0], smallest);
            const long range = ranged ? row : 0;
            part[block] =
                uniform_slopes(v + at, r + at, Grid(s, qmin[range], qmax[range]), to + at, size);
            if (other) join_block(v + at, other + at, low, high, to + at, size);
        });
    });
    sum_rows(parts, rows, by_row, raw, scale, sums);
}

extern "C" void clipped(long half, const void* values, const float* raw, long by_row, float smallest,
                        const float* levels, long n_levels, void* out, long rows, long columns,
                        long threads) {
    const Levels table(levels, n_levels);
    typed(half, [=, &table](auto kind) {
        using T = decltype(kind);
        const T* v = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        for_blocks(rows, columns, threads, [=, &table](long, long row, long at, long size) {
            const float alpha = positive(raw[by_row ? row : 0], smallest);
            nearest_block(v + at, alpha, table, to + at, size);
        });
    });
}

extern "C" void clipped_backward(long half, const void* values, const void* upstream,
                                 const float* raw, long by_row, float smallest, const float* levels,
                                 long n_levels, float scale, void* grad_values, float* sums,
                                 long rows, long columns, long threads) {
    std::vector<float> parts(rows * blocks_of(columns));
    float* part = parts.data();
    const Levels table(levels, n_levels);
    typed(half, [=, &table](auto kind) {
        using T = decltype(kind);
        const T *v = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        T* to = static_cast<T*>(grad_values);
        for_blocks(rows, columns, threads, [=, &table](long block, long row, long at, long size) {
            const float alpha = positive(raw[by_row ? row : 0], smallest);
            part[block] = nearest_slopes(v + at, r + at, alpha, table, to + at, size);
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
    const Levels table(levels, n_levels);
    typed(half, [=, &table](auto kind) {
        using T = decltype(kind);
        const T* w = static_cast<const T*>(weights);
        T* to = static_cast<T*>(out);
        for_blocks(1, n_values, threads, [=, &table](long block, long, long at, long size) {
            IntervalSums found(n_levels);
            codebook_block(w + at, table, to + at, found, size);
            found.total(part + n_sums * block);
        });
    });
    total_of(parts, n_sums, sums);
}

// Uniform quantization of values that lie channels last, by a step for each sample (ASQ), which an
// adapter finds from channel means, # shape: (samples, channels); see `adapter.hpp`. Where `clipped`
// is no null, behind a clipping.
extern "C" void adaptive(long half, const void* values, float low, float high, const float* raw,
                         float smallest, const float* hidden, const float* hidden_bias,
                         const float* output, const float* output_bias, float least,
                         const float* qmin, const float* qmax, void* clipped, float* means,
                         float* steps, float* beta, float* inner, float* outputs, void* out,
                         long width, long samples, long pixels, long channels, long threads) {
    const Samples all(samples, pixels, channels);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T *kept = static_cast<T*>(clipped), *to = static_cast<T*>(out);
        const T* y = kept ? kept : x;
        all.each_group(sizeof(T), threads, [&](long first, long last) {
            for (long sample = first; sample < last; ++sample) {
                std::vector<float> sum(all.lines.width);
                all.sum_down<1>(sample, {sum.data()}, [=](long, auto kind) {
                    using V = decltype(kind);
                    return [=](long i) -> std::array<V, 1> {
                        const V value = at(x, i, V{});
                        if (!kept) return {value};
                        const V within_bounds = as_stored(clip(value, low, high), x);
                        set(kept, i, within_bounds);
                        return {within_bounds};
                    };
                });
                float* own = means + sample * channels;
                all.fold(sum, own);
                for (long c = 0; c < channels; ++c) own[c] /= static_cast<float>(pixels);
            }
            steps_by_adapters(means + first * channels, raw, smallest, hidden, hidden_bias, output,
                              output_bias, least, steps + first, beta + first,
                              inner + (hidden ? first * width : 0), outputs + first, 1,
                              last - first, channels, width, 1);
            for (long sample = first; sample < last; ++sample) {
                const long begin = all.begin(sample);
                uniform_block(y + begin, steps[sample], *qmin, *qmax, to + begin, all.lines.size);
            }
        });
    });
}

extern "C" void adaptive_backward(
    long half, const void* values, const void* upstream, const void* beside, float low, float high,
    const float* raw, float smallest, const float* hidden, const float* output, float least,
    const float* qmin, const float* qmax, float features, const float* means, const float* steps,
    const float* beta, const float* inner, const float* outputs, void* grad_values, float* grad_raw,
    float* grad_hidden, float* grad_hidden_bias, float* grad_output, float* grad_output_bias,
    long width, long samples, long pixels, long channels, long threads) {
    const Samples all(samples, pixels, channels);
    std::vector<float> grad_steps(samples), shares(samples * channels);
    AdapterGradients gradients(means, raw, smallest, hidden, output, least, beta, inner, outputs, 1,
                               samples, channels, width);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T *y = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        const T* other = static_cast<const T*>(beside);
        T* to = static_cast<T*>(grad_values);
        // A group's values are passed over twice while they are near.
        all.each_group(3 * sizeof(T), threads, [&](long first, long last) {
            for (long sample = first; sample < last; ++sample) {
                const Grid grid(steps[sample], *qmin, *qmax);
                double sum = 0.0;
                all.along(sample, [&](long at, long size) {
                    sum += step_slope(y + at, r + at, grid, size);
                });
                grad_steps[sample] = static_cast<float>(sum);
            }
            gradients.pull(grad_steps.data(), 0, first, last - first, shares.data());
            for (long sample = first; sample < last; ++sample) {
                const Grid grid(steps[sample], *qmin, *qmax);
                float* own = shares.data() + sample * channels;
                for (long c = 0; c < channels; ++c) own[c] /= static_cast<float>(pixels);
                const std::vector<float> share = all.lines.repeated(own);
                all.along(sample, [&](long at, long size) {
                    shared_line(grid, y + at, r + at, share.data(), to + at, size);
                    if (other) join_block(y + at, other + at, low, high, to + at, size);
                });
            }
        });
    });
    gradients.total(grad_steps.data(), qmax, features, grad_raw, grad_hidden, grad_hidden_bias,
                    grad_output, grad_output_bias, threads);
}

// `index`: how many cuts lie below each value.
extern "C" void thresholds(long half, const void* values, const float* in_scale, const float* cuts,
                           long n_cuts, const float* step, const float* qmin, void* out,
                           uint8_t* index, long n_values, long threads) {
    const float beta = *in_scale, d = *step, n = *qmin;
    const Cuts sorted({cuts, cuts + n_cuts});
    typed(half, [=, &sorted](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        for_blocks(1, n_values, threads, [=, &sorted](long, long, long at, long size) {
            thresholds_block(x + at, beta, sorted, d, n, to + at, index + at, size);
        });
    });
}

// The same behind a clipping; what is clipped goes to `clipped`.
extern "C" void rectified_thresholds(long half, const void* values, float low, float high,
                                     const float* in_scale, const float* cuts, long n_cuts,
                                     const float* step, const float* qmin, void* clipped, void* out,
                                     uint8_t* index, long n_values, long threads) {
    const float beta = *in_scale, d = *step, n = *qmin;
    const Cuts sorted({cuts, cuts + n_cuts});
    typed(half, [=, &sorted](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T *y = static_cast<T*>(clipped), *to = static_cast<T*>(out);
        for_blocks(1, n_values, threads, [=, &sorted](long, long, long at, long size) {
            clip_block(x + at, low, high, y + at, size);
            thresholds_block(y + at, beta, sorted, d, n, to + at, index + at, size);
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
                                    const void* beside, float low, float high, void* grad_values,
                                    float* sums, long n_values, long threads) {
    const Intervals known = {knots, slopes, n_knots, *in_scale, *qmin};
    const long n_sums = 2 * n_knots + 1;
    std::vector<float> parts(n_sums * blocks_of(n_values));
    float* part = parts.data();
    typed(half, [=, &known](auto kind) {
        using T = decltype(kind);
        const T *x = static_cast<const T*>(values), *gradient = static_cast<const T*>(upstream);
        const T* other = static_cast<const T*>(beside);
        T* to = static_cast<T*>(grad_values);
        for_blocks(1, n_values, threads, [=, &known](long block, long, long at, long size) {
            IntervalSums found(n_knots);
            float* own = part + n_sums * block;
            own[n_sums - 1] = interval_slopes(known, x + at, gradient + at, index + at, to + at,
                                              found, size);
            found.total(own);
            if (other) join_block(x + at, other + at, low, high, to + at, size);
        });
    });
    total_of(parts, n_sums, sums);
}

// ---- Parameters of the passes, small as they are: one call instead of dozens of tensor operations ----

// N2UQ's m widths as they are used, m + 1 knots, m cuts, m + 1 slopes, beta_1 and the step. `half` is
// never set, here and below.
extern "C" void used_intervals(long, const void* start, const float* widths, const float* in_scale,
                               const float* out_scale, long m, float narrowest, float smallest,
                               float* a, float* knots, float* cuts, float* slopes, float* beta,
                               float* step) {
    const int64_t count = m;
    const Trained trained = {static_cast<const float*>(start), widths, in_scale, out_scale,
                             &count, m, narrowest, smallest};
    const Used used(trained, 0);
    std::copy(used.a.begin(), used.a.end(), a);
    std::copy(used.knots.begin(), used.knots.end(), knots);
    std::copy(used.cuts.begin(), used.cuts.end(), cuts);
    std::copy(used.slopes.begin(), used.slopes.end(), slopes);
    *beta = used.beta;
    *step = used.step;
}

// `sums`: as `thresholds_backward` finds them.
extern "C" void interval_gradients(long, const void* start, const float* widths,
                                   const float* in_scale, const float* out_scale, long m,
                                   float narrowest, float smallest, const float* sums,
                                   float* grad_start, float* grad_widths, float* grad_in,
                                   float* grad_out) {
    const int64_t count = m;
    const Trained trained = {static_cast<const float*>(start), widths, in_scale, out_scale,
                             &count, m, narrowest, smallest};
    Used(trained, 0).gradients(trained, 0, sums, grad_start, grad_widths, grad_in, grad_out);
}

// Moves a codebook towards the means of its levels' weights; the middle level stays. `sums`: as
// `codebook` finds them. The arithmetic is that of `moved_codebook` of `adq.py`.
extern "C" void follow(long, void* levels, const float* sums, const float* momentum, long n_levels) {
    float* level = static_cast<float*>(levels);
    for (long k = 0; k < n_levels; ++k) {
        const float count = sums[n_levels + k], mean = sums[k] / (count < 1.0f ? 1.0f : count);
        level[k] += k == n_levels / 2 ? 0.0f : mean * (1.0f - *momentum);
    }
}

// See `adapter.hpp`.
extern "C" void adapted_steps(long, const void* means, const float* raw, float smallest,
                              const float* hidden, const float* hidden_bias, const float* output,
                              const float* output_bias, float least, float* steps, float* beta,
                              float* inner, float* outputs, long slots, long samples, long channels,
                              long width, long threads) {
    steps_by_adapters(static_cast<const float*>(means), raw, smallest, hidden, hidden_bias, output,
                      output_bias, least, steps, beta, inner, outputs, slots, samples, channels,
                      width, threads);
}

extern "C" void adapted_steps_backward(
    long, const void* means, const float* upstream, const float* raw, float smallest,
    const float* qmax, float features, const float* hidden, const float* output, float least,
    const float* beta, const float* inner, const float* outputs, float* to_means, float* grad_raw,
    float* grad_hidden, float* grad_hidden_bias, float* grad_output, float* grad_output_bias,
    long slots, long samples, long channels, long width, long threads) {
    adapters_backward(static_cast<const float*>(means), upstream, raw, smallest, qmax, features,
                      hidden, output, least, beta, inner, outputs, to_means, grad_raw, grad_hidden,
                      grad_hidden_bias, grad_output, grad_output_bias, slots, samples, channels,
                      width, threads);
}

CALLED_BY_GRAPH(uniform)
CALLED_BY_GRAPH(uniform_backward)
CALLED_BY_GRAPH(clipped)
CALLED_BY_GRAPH(clipped_backward)
CALLED_BY_GRAPH(codebook)
CALLED_BY_GRAPH(follow)
CALLED_BY_GRAPH(used_intervals)
CALLED_BY_GRAPH(thresholds)
CALLED_BY_GRAPH(thresholds_backward)
CALLED_BY_GRAPH(interval_gradients)
CALLED_BY_GRAPH(rectified_uniform)
CALLED_BY_GRAPH(rectified_thresholds)
CALLED_BY_GRAPH(adaptive)
CALLED_BY_GRAPH(adaptive_backward)
