// Batch norm, the clipping behind it and the quantizer behind that, forward and backward; called by
// `_passes.py`.
//
// A tensor comes channels last: pixels one after the other, each with its channels side by side.
// Several pixels make a line of about WIDTH values, for which figures of the channels are repeated.
// Sums are taken in blocks of lines, so that they do not depend on the number of threads. What lies
// between the norm's input and the output exists only line by line.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "adapter.hpp"
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

// The step and the codes' range that gradients through uniform quantization need.
struct Grid {
    float n, p, low, high, per_step;

    Grid(float s, float n, float p) : n(n), p(p), low(n * s), high(p * s), per_step(1.0f / s) {}
};

// As `uniform_slopes`: the gradient to y where the quantizer lets it through; its part of the
// gradient to the step is added to `sum`.
inline float through_grid(const Grid grid, float y, float upstream, float& sum) {
    const float z = clip(y * grid.per_step, grid.n, grid.p);
    const float inside = (y > grid.low) & (y < grid.high) ? 1.0f : 0.0f;
    sum += (std::nearbyint(z) - inside * z) * upstream;
    return upstream * inside;
}

// `add_products` with gradients through uniform quantization, each of which `keep` takes; returns
// the part of the gradient to the step. `room` for a line is used where values are rounded: compilers
// lose their way in one loop that does so too.
template <class T, class Keep>
float add_uniform_products(const Clipped by, const Grid grid, const T* __restrict x,
                           const T* __restrict upstream, float* __restrict first,
                           float* __restrict second, long size, T* __restrict room,
                           const Keep keep) {
    constexpr bool is_rounded = !std::is_same_v<T, float>;
    if (is_rounded) clipped_line(by, x, room, size);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long j = 0; j < size; ++j) {
        const float value = load(x, j), y = value * by.a[j] + by.b[j];
        const float kept_y = is_rounded ? load(room, j) : clip(y, by.low, by.high);
        const float grad_y = through_grid(grid, kept_y, load(upstream, j), sum);
        const float r = (y > by.low) & (y < by.high) ? grad_y : 0.0f;
        keep(j, grad_y);
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
                                     room.data(), [](long, float) {});
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
    // Sums of a line's places by channel.
    void fold(const std::vector<float>& of_line, float* of_channels) const {
        std::vector<double> sums(lines.channels);
        for (long begin = 0; begin < lines.width; begin += lines.channels)
            for (long c = 0; c < lines.channels; ++c) sums[c] += of_line[begin + c];
        for (long c = 0; c < lines.channels; ++c) of_channels[c] = static_cast<float>(sums[c]);
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

// Clipped values, and their sums by place in the line.
template <class T>
void rectified_line(const T* __restrict x, float low, float high, T* __restrict y,
                    float* __restrict sum, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) store(y, j, clip(load(x, j), low, high));
#pragma omp simd
    for (long j = 0; j < size; ++j) sum[j] += load(y, j);
}

// Gradients to what was clipped: to those given, gradients from elsewhere and shares are added.
template <class T>
void joined_line(const T* __restrict y, const T* __restrict other, const float* __restrict share,
                 float low, float high, T* __restrict grad, long size) {
#pragma omp simd
    for (long j = 0; j < size; ++j) {
        const float value = load(y, j), sum = load(grad, j) + load(other, j) + share[j];
        store(grad, j, (value > low) & (value < high) ? sum : 0.0f);
    }
}

// Passes over tensors, as what Python calls below. `sums`: by sample and channel, what `add_open` adds,
// # shape: (3, samples, channels). `pixels` are those of one sample.
void open_sums(long half, const void* values, const float* weight, const float* bias,
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

void uniform_by_sample(long half, const void* values, const float* weight,
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
            each_line([&](long begin, long size) {
                uniform_line(norm.clipped(low, high), x + begin, steps[sample], *qmin, *qmax,
                             to + begin, size);
            });
        });
    });
}

// Gradients to y and to the steps, and by channel the sums of r, then those of r (x - mean).
void sample_slopes(long half, const void* values, const void* upstream,
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
            std::vector<float> first(all.lines.width), second(all.lines.width);
            std::vector<T> room(all.lines.width);
            const Grid grid(steps[sample], *qmin, *qmax);
            double sum = 0.0;
            each_line([&](long begin, long size) {
                T* kept = grad_y + begin;
                sum += add_uniform_products(by, grid, x + begin, r + begin, first.data(),
                                            second.data(), size, room.data(),
                                            [=](long j, float grad) { store(kept, j, grad); });
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
void shared_slopes(long half, const void* values, const float* weight, const float* bias,
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
        const T *x = static_cast<const T*>(values), *grad_y = static_cast<const T*>(upstream);
        const GivenSlopes<T> behind = {norm.clipped(low, high), x, grad_y,
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
    const float s = positive(*raw, smallest), n = *qmin, p = *qmax;
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        lines.each(threads, [&](long, const auto each_line) {
            each_line([&](long begin, long size) {
                uniform_line(norm.clipped(low, high), x + begin, s, n, p, to + begin, size);
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
    const Grid grid(positive(*raw, smallest), *qmin, *qmax);
    std::vector<double> parts(lines.blocks);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T *x = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        T* to = static_cast<T*>(grad_values);
        const std::vector<T> line(lines.width);
        norm_slopes(lines, weight, inverse, grad_weight, grad_bias, threads, [&](long block) {
            return UniformSlopes<T>{by, grid, x, r, to, &parts[block], line};
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
    const long n_sums = 2 * n_knots + 1;
    std::vector<float> parts(n_sums * lines.blocks);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T *x = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        T* to = static_cast<T*>(grad_values);
        norm_slopes(lines, weight, inverse, grad_weight, grad_bias, threads, [&](long block) {
            return IntervalSlopes<T>(by, known, x, r, index, to, &parts[n_sums * block],
                                     lines.width);
        });
    });
    total_of(parts, n_sums, sums);
}

// The same with a step for each sample (ASQ), which an adapter finds from channel means of y; see
// `adapter.hpp`. `sums`: what `open_sums` says.
extern "C" void adaptive(long half, const void* values, const float* weight, const float* bias,
                         const float* mean, const float* inverse, float low, float high,
                         const float* raw, float smallest, const float* hidden,
                         const float* hidden_bias, const float* output, const float* output_bias,
                         float least, const float* qmin, const float* qmax, float* sums,
                         float* means, float* steps, float* beta, float* inner, float* outputs,
                         void* out, long width, long samples, long pixels, long channels,
                         long threads) {
    open_sums(half, values, weight, bias, mean, inverse, low, high, sums, samples, pixels, channels,
              threads);
    const float share = 1.0f / static_cast<float>(pixels);
    for (long i = 0; i < samples * channels; ++i) means[i] = sums[i] * share;
    steps_by_adapters(means, raw, smallest, hidden, hidden_bias, output, output_bias, least, steps,
                      beta, inner, outputs, 1, samples, channels, width, threads);
    uniform_by_sample(half, values, weight, bias, mean, inverse, low, high, steps, qmin, qmax, out,
                      samples, pixels, channels, threads);
}

extern "C" void adaptive_backward(
    long half, const void* values, const void* upstream, const float* weight, const float* bias,
    const float* mean, const float* inverse, float low, float high, const float* raw,
    float smallest, const float* hidden, const float* output, float least, const float* qmin,
    const float* qmax, float features, const float* sums, const float* means, const float* steps,
    const float* beta, const float* inner, const float* outputs, void* grad_values,
    float* grad_weight, float* grad_bias, float* grad_raw, float* grad_hidden,
    float* grad_hidden_bias, float* grad_output, float* grad_output_bias, long width, long samples,
    long pixels, long channels, long threads) {
    std::vector<float> grad_steps(samples), products(2 * channels), shares(samples * channels);
    sample_slopes(half, values, upstream, weight, bias, mean, inverse, low, high, steps, qmin, qmax,
                  grad_values, grad_steps.data(), products.data(), samples, pixels, channels,
                  threads);
    adapters_backward(means, grad_steps.data(), raw, smallest, qmax, features, hidden, output, least,
                      beta, inner, outputs, shares.data(), grad_raw, grad_hidden, grad_hidden_bias,
                      grad_output, grad_output_bias, 1, samples, channels, width, threads);
    for (float& share : shares) share /= static_cast<float>(pixels);
    shared_slopes(half, values, weight, bias, mean, inverse, low, high, sums, products.data(),
                  shares.data(), grad_values, grad_weight, grad_bias, samples, pixels, channels,
                  threads);
}

// Clipping and ASQ behind it, where others read the clipped values too; they go to `clipped`.
extern "C" void rectified(long half, const void* values, float low, float high, const float* raw,
                          float smallest, const float* hidden, const float* hidden_bias,
                          const float* output, const float* output_bias, float least,
                          const float* qmin, const float* qmax, void* clipped, float* means,
                          float* steps, float* beta, float* inner, float* outputs, void* out,
                          long width, long samples, long pixels, long channels, long threads) {
    const Samples all(samples, pixels, channels);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T *y = static_cast<T*>(clipped), *to = static_cast<T*>(out);
        all.each(threads, [&](long sample, const auto each_line) {
            std::vector<float> sum(all.lines.width);
            each_line([&](long begin, long size) {
                rectified_line(x + begin, low, high, y + begin, sum.data(), size);
            });
            float* own = means + sample * channels;
            all.fold(sum, own);
            for (long c = 0; c < channels; ++c) own[c] /= static_cast<float>(pixels);
        });
        steps_by_adapters(means, raw, smallest, hidden, hidden_bias, output, output_bias, least,
                          steps, beta, inner, outputs, 1, samples, channels, width, threads);
        all.each(threads, [&](long sample, const auto each_line) {
            each_line([&](long begin, long size) {
                uniform_block(y + begin, steps[sample], *qmin, *qmax, to + begin, size);
            });
        });
    });
}

// `beside`: the gradient that comes to the clipped values by others.
extern "C" void rectified_backward(
    long half, const void* clipped, const void* upstream, const void* beside, float low, float high,
    const float* raw, float smallest, const float* hidden, const float* output, float least,
    const float* qmin, const float* qmax, float features, const float* means, const float* steps,
    const float* beta, const float* inner, const float* outputs, void* grad_values, float* grad_raw,
    float* grad_hidden, float* grad_hidden_bias, float* grad_output, float* grad_output_bias,
    long width, long samples, long pixels, long channels, long threads) {
    const Samples all(samples, pixels, channels);
    std::vector<float> grad_steps(samples), shares(samples * channels);
    typed(half, [&](auto kind) {
        using T = decltype(kind);
        const T *y = static_cast<const T*>(clipped), *r = static_cast<const T*>(upstream);
        const T* other = static_cast<const T*>(beside);
        T* to = static_cast<T*>(grad_values);
        all.each(threads, [&](long sample, const auto each_line) {
            double sum = 0.0;
            each_line([&](long begin, long size) {
                sum += uniform_slopes(y + begin, r + begin, steps[sample], *qmin, *qmax, to + begin,
                                      size);
            });
            grad_steps[sample] = static_cast<float>(sum);
        });
        adapters_backward(means, grad_steps.data(), raw, smallest, qmax, features, hidden, output,
                          least, beta, inner, outputs, shares.data(), grad_raw, grad_hidden,
                          grad_hidden_bias, grad_output, grad_output_bias, 1, samples, channels,
                          width, threads);
        all.each(threads, [&](long sample, const auto each_line) {
            std::vector<float> own(channels);
            for (long c = 0; c < channels; ++c)
                own[c] = shares[sample * channels + c] / static_cast<float>(pixels);
            const std::vector<float> share = all.lines.repeated(own);
            each_line([&](long begin, long size) {
                joined_line(y + begin, other + begin, share.data(), low, high, to + begin, size);
            });
        });
    });
}
