// Batch norm, the clipping behind it and the quantizer behind that, forward and backward; called by
// `_passes.py`.
//
// A tensor comes channels last: pixels one after the other, each with its channels side by side.
// Several pixels make a line of about WIDTH values, for which figures of the channels are repeated.
// Sums are taken in blocks of lines, so that they do not depend on the number of threads. What lies
// between the norm's input and the output exists only line by line.

#include <algorithm>
#include <cmath>
#include <vector>

#include "blocks.hpp"

namespace {

constexpr long WIDTH = 512;
constexpr long VALUES_OF_BLOCK = 32768;
// Pixels whose mean is near enough to the mean of all that no digits are lost in sums of squares.
constexpr long SAMPLE = 64;

struct Lines {
    long channels, pixels, size, width, in_block, blocks;

    Lines(long pixels, long channels) : channels(channels), pixels(pixels), size(pixels * channels) {
        width = std::min(pixels, (WIDTH + channels - 1) / channels) * channels;
        in_block = std::max(1L, VALUES_OF_BLOCK / width) * width;
        blocks = (size + in_block - 1) / in_block;
    }

    std::vector<float> repeated(const std::vector<float>& of_channels) const {
        std::vector<float> of_line(width);
        for (long j = 0; j < width; ++j) of_line[j] = of_channels[j % channels];
        return of_line;
    }

    // Call `work(block, lines)` for each block, where `lines(use)` calls `use(begin, size)` for each
    // of its lines in order. The last line may be shorter.
    template <class Work>
    void each(long threads, const Work work) const {
        if (size < VALUES_WORTH_THREADS) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (long block = 0; block < blocks; ++block) {
            const long end = std::min(size, (block + 1) * in_block);
            work(block, [=](const auto use) {
                for (long begin = block * in_block; begin < end; begin += width)
                    use(begin, std::min(width, end - begin));
            });
        }
    }
};

// Two sums a channel, from partial sums by block and place in its lines.
struct Sums {
    const Lines& lines;
    std::vector<float> parts;

    explicit Sums(const Lines& lines) : lines(lines), parts(2 * lines.width * lines.blocks) {}

    float* first(long block) { return parts.data() + 2 * lines.width * block; }
    float* second(long block) { return first(block) + lines.width; }

    // The first sums of all channels, then the second.
    std::vector<double> total() const {
        const long n = 2 * lines.width, channels = lines.channels;
        std::vector<double> of_line(n), of_channel(2 * channels);
        for (long block = 0; block < lines.blocks; ++block)
            for (long j = 0; j < n; ++j) of_line[j] += parts[block * n + j];
        for (long j = 0; j < lines.width; ++j) {
            of_channel[j % channels] += of_line[j];
            of_channel[channels + j % channels] += of_line[lines.width + j];
        }
        return of_channel;
    }
};

// y = clip(a x + b, low, high); figures of a line's channels.
struct Clipped {
    const float *a, *b, *mean;
    float low, high;
};

// The figures of a norm: a = weight / sqrt(variance + eps), b = bias - a mean, where `inverse` is
// 1 / sqrt(variance + eps).
struct Norm {
    std::vector<float> a, b, mean;

    Norm(const Lines& lines, const float* weight, const float* bias, const float* means,
         const float* inverse)
        : a(lines.channels), b(lines.channels), mean(lines.repeated({means, means + lines.channels})) {
        for (long c = 0; c < lines.channels; ++c) {
            a[c] = weight[c] * inverse[c];
            b[c] = bias[c] - means[c] * a[c];
        }
        a = lines.repeated(a);
        b = lines.repeated(b);
    }
    Clipped clipped(float low, float high) const {
        return {a.data(), b.data(), mean.data(), low, high};
    }
};

template <class T>
void clipped_line(const Clipped by, const T* __restrict x, T* __restrict y, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j)
        store(y, j, clip(load(x, j) * by.a[j] + by.b[j], by.low, by.high));
}

// The gradient to y where the clipping lets it through, else 0.
template <class T>
inline float let_through(const Clipped by, float x, const T* grad_y, long j) {
    const float y = x * by.a[j] + by.b[j];
    return (y > by.low) & (y < by.high) ? load(grad_y, j) : 0.0f;
}

template <class T>
std::vector<float> sample_mean(const T* x, const Lines& lines) {
    const long some = std::min(lines.pixels, SAMPLE);
    std::vector<float> mean(lines.channels);
    for (long i = 0; i < some; ++i)
        for (long c = 0; c < lines.channels; ++c) mean[c] += load(x, i * lines.channels + c);
    for (float& value : mean) value /= static_cast<float>(some);
    return mean;
}

template <class T>
void add_moments(const float* __restrict near, const T* __restrict x, float* __restrict first,
                 float* __restrict second, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) {
        const float distance = load(x, j) - near[j];
        first[j] += distance;
        second[j] += distance * distance;
    }
}

template <class T>
void add_products(const Clipped by, const T* __restrict x, const T* __restrict grad_y,
                  float* __restrict first, float* __restrict second, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) {
        const float value = load(x, j), r = let_through(by, value, grad_y, j);
        first[j] += r;
        second[j] += r * (value - by.mean[j]);
    }
}

// dx = a r - constant - slope (x - mean). `grad_x` may be `grad_y`.
template <class T>
void slopes_line(const Clipped by, const T* x, const T* grad_y, const float* constant,
                 const float* slope, T* grad_x, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) {
        const float value = load(x, j), r = let_through(by, value, grad_y, j);
        store(grad_x, j, by.a[j] * r - constant[j] - slope[j] * (value - by.mean[j]));
    }
}

// Gradients to y, line by line: `first` for the sums, `again` for the gradients to x.
template <class T>
struct GivenSlopes {
    const T* grad_y;

    const T* first(long begin, long) { return grad_y + begin; }
    const T* again(long begin, long) { return grad_y + begin; }
};

// Through uniform quantization; `sum` is the part of the gradient to the step.
template <class T>
struct UniformSlopes {
    Clipped by;
    const T *x, *upstream;
    float s, n, p;
    double* sum;
    std::vector<T> y, grad_y;

    const T* first(long begin, long size) {
        *sum += slopes(begin, size);
        return grad_y.data();
    }
    const T* again(long begin, long size) {
        slopes(begin, size);
        return grad_y.data();
    }
    float slopes(long begin, long size) {
        clipped_line(by, x + begin, y.data(), size);
        return uniform_slopes(y.data(), upstream + begin, s, n, p, grad_y.data(), size);
    }
};

// Through thresholds; `grad_y` keeps what was found, `sums` are those of `thresholds_backward`.
template <class T>
struct IntervalSlopes {
    Clipped by;
    const T *x, *upstream;
    const uint8_t* index;
    const Intervals* known;
    T* grad_y;
    double* sums;
    std::vector<T> y;
    std::vector<float> r, moment, own;
    std::vector<int32_t> interval;

    const T* first(long begin, long size) {
        const long n = known->last + 1;
        clipped_line(by, x + begin, y.data(), size);
        const float codes = interval_slopes(*known, y.data(), upstream + begin, index + begin,
                                            grad_y + begin, r.data(), moment.data(),
                                            interval.data(), size);
        sums_by_interval(r.data(), moment.data(), interval.data(), n, own.data(), size);
        for (long k = 0; k < 2 * n; ++k) sums[k] += own[k];
        sums[2 * n] += codes;
        return grad_y + begin;
    }
    const T* again(long begin, long) { return grad_y + begin; }
};

// What the sums of a norm's backward pass say: gradients to its weight and bias, and what each
// gradient to x is less of: constant + slope (x - mean).
struct Pull {
    std::vector<float> constant, slope;

    // `products`: by channel, the sums of r, then those of r (x - mean).
    Pull(const std::vector<double>& products, const Lines& lines, double n, const float* weight,
         const float* inverse, float* grad_weight, float* grad_bias)
        : constant(lines.channels), slope(lines.channels) {
        for (long c = 0; c < lines.channels; ++c) {
            const double scaled = products[lines.channels + c] * inverse[c];
            const double a = weight[c] * inverse[c];
            grad_bias[c] = static_cast<float>(products[c]);
            grad_weight[c] = static_cast<float>(scaled);
            constant[c] = static_cast<float>(a * products[c] / n);
            slope[c] = static_cast<float>(a * scaled * inverse[c] / n);
        }
        constant = lines.repeated(constant);
        slope = lines.repeated(slope);
    }
};

// The backward pass of a norm; `slopes_of(block)` makes one of the above.
template <class T, class Maker>
void norm_slopes(const Lines& lines, const Clipped by, const T* x, const float* weight,
                 const float* inverse, T* grad_x, float* grad_weight, float* grad_bias, long threads,
                 const Maker slopes_of) {
    Sums sums(lines);
    lines.each(threads, [&](long block, const auto each_line) {
        auto grad_y = slopes_of(block);
        each_line([&](long begin, long size) {
            add_products(by, x + begin, grad_y.first(begin, size), sums.first(block),
                         sums.second(block), size);
        });
    });
    const Pull pull(sums.total(), lines, static_cast<double>(lines.pixels), weight, inverse,
                    grad_weight, grad_bias);
    lines.each(threads, [&](long block, const auto each_line) {
        auto grad_y = slopes_of(block);
        each_line([&](long begin, long size) {
            slopes_line(by, x + begin, grad_y.again(begin, size), pull.constant.data(),
                        pull.slope.data(), grad_x + begin, size);
        });
    });
}

// ---- One step a sample ----

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
    // Add figures of a line's places to those of a sample's channels.
    void fold(const std::vector<float>& of_line, float* of_channels) const {
        for (long c = 0; c < lines.channels; ++c) {
            double sum = 0.0;
            for (long j = c; j < lines.width; j += lines.channels) sum += of_line[j];
            of_channels[c] = static_cast<float>(sum);
        }
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

}  // namespace

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
        lines.each(threads, [&](long block, const auto each_line) {
            each_line([&](long begin, long size) {
                add_moments(near.data(), x + begin, sums.first(block), sums.second(block), size);
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
        lines.each(threads, [&](long, const auto each_line) {
            each_line([&](long begin, long size) {
                clipped_line(norm.clipped(low, high), x + begin, to + begin, size);
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
        const T* grad_y = static_cast<const T*>(upstream);
        norm_slopes(lines, norm.clipped(low, high), static_cast<const T*>(values), weight, inverse,
                    static_cast<T*>(grad_values), grad_weight, grad_bias, threads,
                    [=](long) { return GivenSlopes<T>{grad_y}; });
    });
}

// The same, with uniform quantization of one trained step behind it.
extern "C" void uniform(long half, const void* values, const float* weight, const float* bias,
                        const float* mean, const float* inverse, float low, float high,
                        const float* raw, float smallest, const float* qmin, const float* qmax,
                        void* out, long pixels, long channels, long threads) {
    const Lines lines(pixels, channels);
    const Norm norm(lines, weight, bias, mean, inverse);
    const float s = positive(*raw, smallest), n = *qmin, p = *qmax;
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        lines.each(threads, [&](long, const auto each_line) {
            std::vector<T> y(lines.width);
            each_line([&](long begin, long size) {
                clipped_line(norm.clipped(low, high), x + begin, y.data(), size);
                uniform_block(y.data(), s, n, p, to + begin, size);
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
    const Clipped by = norm.clipped(low, high);
    const float s = positive(*raw, smallest), n = *qmin, p = *qmax;
    std::vector<double> parts(lines.blocks);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T *x = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        const std::vector<T> line(lines.width);
        norm_slopes(lines, by, x, weight, inverse, static_cast<T*>(grad_values), grad_weight,
                    grad_bias, threads, [&](long block) {
                        return UniformSlopes<T>{by, x, r, s, n, p, &parts[block], line, line};
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
        lines.each(threads, [&](long, const auto each_line) {
            std::vector<T> y(lines.width);
            each_line([&](long begin, long size) {
                clipped_line(norm.clipped(low, high), x + begin, y.data(), size);
                thresholds_block(y.data(), *in_scale, sorted, *step, *qmin, to + begin,
                                 index + begin, size);
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
    const Intervals known = {Lookup(knots, n_knots), Lookup(slopes, n_knots),
                             static_cast<int32_t>(n_knots - 1), *in_scale, *qmin};
    const long n_sums = 2 * n_knots + 1, in_strips = (lines.width + STRIP - 1) / STRIP * STRIP;
    std::vector<double> parts(n_sums * lines.blocks);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T *x = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        T* to = static_cast<T*>(grad_values);
        const std::vector<T> line(in_strips);
        const std::vector<float> figures(in_strips), own(n_sums);
        const std::vector<int32_t> interval(in_strips);
        norm_slopes(lines, by, x, weight, inverse, to, grad_weight, grad_bias, threads,
                    [&](long block) {
                        return IntervalSlopes<T>{by,      x,       r,        index,
                                                 &known,  to,      &parts[n_sums * block],
                                                 line,    figures, figures,  own,
                                                 interval};
                    });
    });
    for (long k = 0; k < n_sums; ++k) {
        double sum = 0.0;
        for (long block = 0; block < lines.blocks; ++block) sum += parts[n_sums * block + k];
        sums[k] = static_cast<float>(sum);
    }
}

// The same with a step for each sample (ASQ). `sums`: by sample and channel, what `add_open` adds,
// # shape: (3, samples, channels). `pixels` are those of one sample.
extern "C" void open_sums(long half, const void* values, const float* weight, const float* bias,
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

extern "C" void uniform_by_sample(long half, const void* values, const float* weight,
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
            std::vector<T> y(all.lines.width);
            each_line([&](long begin, long size) {
                clipped_line(norm.clipped(low, high), x + begin, y.data(), size);
                uniform_block(y.data(), steps[sample], *qmin, *qmax, to + begin, size);
            });
        });
    });
}

// Gradients to y and to the steps, and by channel the sums of r, then those of r (x - mean).
extern "C" void sample_slopes(long half, const void* values, const void* upstream,
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
            std::vector<T> y(all.lines.width);
            std::vector<float> first(all.lines.width), second(all.lines.width);
            double sum = 0.0;
            each_line([&](long begin, long size) {
                clipped_line(by, x + begin, y.data(), size);
                sum += uniform_slopes(y.data(), r + begin, steps[sample], *qmin, *qmax,
                                      grad_y + begin, size);
                add_products(by, x + begin, grad_y + begin, first.data(), second.data(), size);
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
extern "C" void shared_slopes(long half, const void* values, const float* weight, const float* bias,
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

// Adds `shares`, # shape: (samples, channels), to gradients where clipped values are open.
extern "C" void add_shares(long half, const void* values, const float* shares, float low, float high,
                           void* gradients, long samples, long pixels, long channels, long threads) {
    const Samples all(samples, pixels, channels);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T* y = static_cast<const T*>(values);
        T* grad = static_cast<T*>(gradients);
        all.each(threads, [&](long sample, const auto each_line) {
            const float* own = shares + sample * channels;
            const std::vector<float> repeated = all.lines.repeated({own, own + channels});
            const float* share = repeated.data();
            each_line([&](long begin, long size) {
#pragma omp simd
                for (long j = 0; j < size; ++j) {
                    const float value = load(y, begin + j), before = load(grad, begin + j);
                    const bool is_open = (value > low) & (value < high);
                    store(grad, begin + j, is_open ? before + share[j] : before);
                }
            });
        });
    });
}
