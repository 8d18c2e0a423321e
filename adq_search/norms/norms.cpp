// Batch norm, the clipping behind it and the quantizer behind that, forward and backward; called by
// `_passes.py`. What lies between the norm's input and the output exists only line by line.

#include <algorithm>
#include <cmath>
#include <vector>

#include "adapter.hpp"
#include "behind.hpp"
#include "blocks.hpp"
#include "norm.hpp"
#include "samples.hpp"

// What Python calls. Values, outputs and their gradients are float32, or bfloat16 where `half`; all
// else is float32, one figure a channel.

// Mean and 1 / sqrt(variance + eps) of each channel over the batch; the share `follow` of both goes
// into the running statistics.
extern "C" void statistics(long half, const void* values, float* running_mean,
                           float* running_variance, float follow, float eps, float* mean,
                           float* inverse, long pixels, long channels, long threads) {
    const Lines lines(pixels, channels);
    const double n = static_cast<double>(pixels);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        const std::vector<float> sampled = sample_mean(x, lines), near = lines.repeated(sampled);
        Sums sums(lines);
        lines.each(threads, [&](long block, long begin, long end) {
            const float* middle = near.data();
            const std::array<float*, 2> own = {sums.first(block), sums.second(block)};
            lines.sum_down(begin, end, own, [=](long j, auto kind) {
                using V = decltype(kind);
                const V from = at(middle, j, kind);
                return [=](long i) -> std::array<V, 2> {
                    const V distance = at(x, i, V{}) - from;
                    return {distance, distance * distance};
                };
            });
        });
        const std::vector<double> moments = sums.total();
        for (long c = 0; c < channels; ++c) {
            const double beyond = moments[c] / n;
            const double variance = std::max(0.0, moments[channels + c] / n - beyond * beyond);
            mean[c] = static_cast<float>(sampled[c] + beyond);
            inverse[c] = static_cast<float>(1.0 / std::sqrt(variance + eps));
            const float unbiased = static_cast<float>(variance * n / (n - 1.0));
            running_mean[c] = (1.0f - follow) * running_mean[c] + follow * mean[c];
            running_variance[c] = (1.0f - follow) * running_variance[c] + follow * unbiased;
        }
    });
}

extern "C" void clipped(long half, const void* values, const float* weight, const float* bias,
                        const float* mean, const float* inverse, float low, float high, void* out,
                        long pixels, long channels, long threads) {
    const Lines lines(pixels, channels);
    const Norm norm(lines, weight, bias, mean, inverse);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        lines.each(threads, [&](long, long begin, long end) {
            lines.along(begin, end, [&](long at, long size) {
                clipped_line(norm.clipped(low, high), x + at, to + at, size);
            });
        });
    });
}

extern "C" void clipped_backward(long half, const void* values, const void* upstream,
                                 const float* weight, const float* bias, const float* mean,
                                 const float* inverse, float low, float high, void* grad_values,
                                 float* grad_weight, float* grad_bias, long pixels, long channels,
                                 long threads) {
    const Lines lines(pixels, channels);
    const Norm norm(lines, weight, bias, mean, inverse);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T *x = static_cast<const T*>(values), *grad_y = static_cast<const T*>(upstream);
        const GivenSlopes<T> behind = {lines, norm.clipped(low, high), x, grad_y,
                                       static_cast<T*>(grad_values)};
        norm_slopes(lines, weight, inverse, grad_weight, grad_bias, threads,
                    [=](long) { return behind; });
    });
}

// The same, with uniform quantization of one trained step behind it.
extern "C" void uniform(long half, const void* values, const float* weight, const float* bias,
                        const float* mean, const float* inverse, float low, float high,
                        const float* raw, float smallest, const float* qmin, const float* qmax,
                        void* out, long pixels, long channels, long threads) {
    const Lines lines(pixels, channels);
    const Norm norm(lines, weight, bias, mean, inverse);
    const Behind behind(norm.clipped(low, high), positive(*raw, smallest), *qmin, *qmax);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        lines.each(threads, [&](long, long begin, long end) {
            lines.along(begin, end, [&](long at, long size) {
                uniform_line(behind, x + at, to + at, size);
            });
        });
    });
}

// `scale` is LSQ's, of the gradient to the step.
extern "C" void uniform_backward(long half, const void* values, const void* upstream,
                                 const float* weight, const float* bias, const float* mean,
                                 const float* inverse, float low, float high, const float* raw,
                                 float smallest, const float* qmin, const float* qmax,
                                 float scale, void* grad_values, float* grad_weight, float* grad_bias,
                                 float* grad_step, long pixels, long channels, long threads) {
    const Lines lines(pixels, channels);
    const Norm norm(lines, weight, bias, mean, inverse);
    const Behind behind(norm.clipped(low, high), positive(*raw, smallest), *qmin, *qmax);
    std::vector<double> parts(lines.blocks);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T *x = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        T* to = static_cast<T*>(grad_values);
        norm_slopes(lines, weight, inverse, grad_weight, grad_bias, threads, [&](long block) {
            return UniformSlopes<T>{lines, behind, x, r, to, &parts[block]};
        });
    });
    double sum = 0.0;
    for (const double part : parts) sum += part;
    *grad_step = static_cast<float>(sum) * (*raw < 0.0f ? -scale : scale);
}

// The same, with N2UQ behind the norm; see `thresholds` and `thresholds_backward` of the quantizers.
extern "C" void thresholds(long half, const void* values, const float* weight, const float* bias,
                           const float* mean, const float* inverse, float low, float high,
                           const float* in_scale, const float* cuts, long n_cuts, const float* step,
                           const float* qmin, void* out, uint8_t* index, long pixels, long channels,
                           long threads) {
    const Lines lines(pixels, channels);
    const Norm norm(lines, weight, bias, mean, inverse);
    const Cuts sorted({cuts, cuts + n_cuts});
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        lines.each(threads, [&](long, long begin, long end) {
            std::vector<T> y(lines.width);
            lines.along(begin, end, [&](long at, long size) {
                clipped_line(norm.clipped(low, high), x + at, y.data(), size);
                thresholds_block(y.data(), *in_scale, sorted, *step, *qmin, to + at, index + at,
                                 size);
            });
        });
    });
}

extern "C" void thresholds_backward(long half, const void* values, const void* upstream,
                                    const float* weight, const float* bias, const float* mean,
                                    const float* inverse, float low, float high,
                                    const uint8_t* index, const float* in_scale, const float* knots,
                                    const float* slopes, long n_knots, const float* qmin,
                                    void* grad_values, float* grad_weight, float* grad_bias,
                                    float* sums, long pixels, long channels, long threads) {
    const Lines lines(pixels, channels);
    const Norm norm(lines, weight, bias, mean, inverse);
    const Clipped by = norm.clipped(low, high);
    const Intervals known = {knots, slopes, n_knots, *in_scale, *qmin};
    const long n_sums = 2 * n_knots + 1;
    std::vector<float> parts(n_sums * lines.blocks);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T *x = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        T* to = static_cast<T*>(grad_values);
        norm_slopes(lines, weight, inverse, grad_weight, grad_bias, threads, [&](long block) {
            return IntervalSlopes<T>{lines, by, known, x, r, index, to, &parts[n_sums * block]};
        });
    });
    total_of(parts, n_sums, sums);
}

// The same with a step for each sample (ASQ), which an adapter finds from channel means of y,
// # shape: (samples, channels); see `adapter.hpp`.
extern "C" void adaptive(long half, const void* values, const float* weight, const float* bias,
                         const float* mean, const float* inverse, float low, float high,
                         const float* raw, float smallest, const float* hidden,
                         const float* hidden_bias, const float* output, const float* output_bias,
                         float least, const float* qmin, const float* qmax, float* means,
                         float* steps, float* beta, float* inner, float* outputs, void* out,
                         long width, long samples, long pixels, long channels, long threads) {
    const Samples all(samples, pixels, channels);
    const Norm norm(all.lines, weight, bias, mean, inverse);
    const Clipped by = norm.clipped(low, high);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        all.each_group(sizeof(T), threads, [&](long first, long last) {
            for (long sample = first; sample < last; ++sample)
                sample_means(all, by, x, sample, means + sample * channels);
            steps_by_adapters(means + first * channels, raw, smallest, hidden, hidden_bias, output,
                              output_bias, least, steps + first, beta + first,
                              inner + (hidden ? first * width : 0), outputs + first, 1,
                              last - first, channels, width, 1);
            for (long sample = first; sample < last; ++sample) {
                const Behind behind(by, steps[sample], *qmin, *qmax);
                all.along(sample, [&](long at, long size) {
                    uniform_line(behind, x + at, to + at, size);
                });
            }
        });
    });
}

extern "C" void adaptive_backward(
    long half, const void* values, const void* upstream, const float* weight, const float* bias,
    const float* mean, const float* inverse, float low, float high, const float* raw,
    float smallest, const float* hidden, const float* output, float least, const float* qmin,
    const float* qmax, float features, const float* means, const float* steps,
    const float* beta, const float* inner, const float* outputs, void* grad_values,
    float* grad_weight, float* grad_bias, float* grad_raw, float* grad_hidden,
    float* grad_hidden_bias, float* grad_output, float* grad_output_bias, long width, long samples,
    long pixels, long channels, long threads) {
    const Samples all(samples, pixels, channels);
    const Norm norm(all.lines, weight, bias, mean, inverse);
    const Clipped by = norm.clipped(low, high);
    std::vector<float> grad_steps(samples), shares(samples * channels);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T *x = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        const SampleSums sums =
            sample_slopes(all, by, x, r, steps, *qmin, *qmax, grad_steps.data(), threads);
        adapters_backward(means, grad_steps.data(), raw, smallest, qmax, features, hidden, output,
                          least, beta, inner, outputs, shares.data(), grad_raw, grad_hidden,
                          grad_hidden_bias, grad_output, grad_output_bias, 1, samples, channels,
                          width, threads);
        for (float& share : shares) share /= static_cast<float>(pixels);
        const Pull pull(sums.with_shares(shares, channels), all.lines,
                        static_cast<double>(samples * pixels), weight, inverse, grad_weight,
                        grad_bias);
        shared_slopes(all, by, pull, x, r, steps, *qmin, *qmax, shares.data(),
                      static_cast<T*>(grad_values), threads);
    });
}

CALLED_BY_GRAPH(statistics)
CALLED_BY_GRAPH(clipped)
CALLED_BY_GRAPH(clipped_backward)
CALLED_BY_GRAPH(uniform)
CALLED_BY_GRAPH(uniform_backward)
CALLED_BY_GRAPH(thresholds)
CALLED_BY_GRAPH(thresholds_backward)
CALLED_BY_GRAPH(adaptive)
CALLED_BY_GRAPH(adaptive_backward)
