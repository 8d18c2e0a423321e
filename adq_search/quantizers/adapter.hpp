// ASQ's adapters [Zhou2025, algorithm 1]: from channel means to a step for each sample, and back.
//
// The arithmetic is that of `Adapter` in `asq.py`; products are summed in another order.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "blocks.hpp"

namespace {

// With fewer products a second thread costs more than it brings.
constexpr long PRODUCTS_WORTH_THREADS = 1L << 18;

inline float rectified(float z) { return z < 0.0f ? 0.0f : z; }

// Rows that are taken at once: what all of them meet is then read from memory once.
constexpr long ROWS = 4;

// Products of up to ROWS rows with one vector.
inline void dots(const float* __restrict rows, long n_rows, const float* __restrict with, long n,
                 float* out) {
    if (n_rows < ROWS) {
        for (long j = 0; j < n_rows; ++j) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < n; ++i) sum += rows[j * n + i] * with[i];
            out[j] = sum;
        }
        return;
    }
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
    for (long i = 0; i < n; ++i) {
        a += rows[i] * with[i];
        b += rows[n + i] * with[i];
        c += rows[2 * n + i] * with[i];
        d += rows[3 * n + i] * with[i];
    }
    out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}

inline void add_scaled(float scale, const float* __restrict a, float* __restrict to, long n) {
#pragma omp simd
    for (long i = 0; i < n; ++i) to[i] += scale * a[i];
}

// Add rows times a factor each, which lie `stride` apart.
inline void add_all_scaled(const float* __restrict scales, long stride, const float* __restrict rows,
                           long n_rows, float* __restrict to, long n) {
    long j = 0;
    for (; j + ROWS <= n_rows; j += ROWS) {
        const float a = scales[j * stride], b = scales[(j + 1) * stride];
        const float c = scales[(j + 2) * stride], d = scales[(j + 3) * stride];
        const float* own = rows + j * n;
#pragma omp simd
        for (long i = 0; i < n; ++i)
            to[i] += (a * own[i] + b * own[n + i]) + (c * own[2 * n + i] + d * own[3 * n + i]);
    }
    for (; j < n_rows; ++j) add_scaled(scales[j * stride], rows + j * n, to, n);
}

// Call `work(i)` for i < n.
template <class Work>
void in_threads(long n, long products, long threads, const Work work) {
    if (products < PRODUCTS_WORTH_THREADS) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long i = 0; i < n; ++i) work(i);
}

// Call `work(j, first, n)` for n samples of the j-th of the slots, counted over all of them.
template <class Work>
void for_samples(long slots, long samples, long products, long threads, const Work work) {
    const long blocks = (samples + ROWS - 1) / ROWS;
    in_threads(slots * blocks, products, threads, [=](long block) {
        const long j = block / blocks, before = block % blocks * ROWS;
        work(j, j * samples + before, before + ROWS < samples ? ROWS : samples - before);
    });
}

// One adapter: channels to `width` to one, or channels to one where there are no hidden weights.
struct Adapter {
    const float *hidden, *hidden_bias, *output, *output_bias;
    long channels, width;

    Adapter(const float* hidden, const float* hidden_bias, const float* output,
            const float* output_bias, long channels, long width, long j)
        : hidden(hidden ? hidden + j * width * channels : nullptr),
          hidden_bias(hidden ? hidden_bias + j * width : nullptr), output(output + j * width),
          output_bias(output_bias + j), channels(channels), width(width) {}

    // Activations of up to ROWS samples: hidden ones, where there are any, and the output.
    void run(const float* means, long samples, float* inner, float* outputs) const {
        if (hidden != nullptr) {
            for (long k = 0; k < width; ++k) {
                float found[ROWS];
                dots(means, samples, hidden + k * channels, channels, found);
                for (long j = 0; j < samples; ++j)
                    inner[j * width + k] = rectified(found[j] + hidden_bias[k]);
            }
        }
        dots(hidden != nullptr ? inner : means, samples, output, width, outputs);
        for (long j = 0; j < samples; ++j) outputs[j] = rectified(outputs[j] + *output_bias);
    }

    // Gradients to up to ROWS samples' hidden activations before their ReLU, and to their means.
    void pull(const float* to_outs, long samples, const float* inner, float* to_inner,
              float* to_means) const {
        for (long j = 0; j < samples; ++j) {
            float* to_mean = to_means + j * channels;
            for (long c = 0; c < channels; ++c)
                to_mean[c] = hidden != nullptr ? 0.0f : to_outs[j] * output[c];
        }
        if (hidden == nullptr) return;
        for (long j = 0; j < samples; ++j) {
            float* own = to_inner + j * width;
            for (long k = 0; k < width; ++k)
                own[k] = inner[j * width + k] > 0.0f ? to_outs[j] * output[k] : 0.0f;
            add_all_scaled(own, 1, hidden, width, to_means + j * channels, channels);
        }
    }
};

// Steps of samples by adapters of `slots` quantizers, # shape: (slots, samples): s_a = |raw| beta,
// beta, and the output activations; hidden ones, # shape: (slots, samples, width). No hidden weights:
// null, and width is that of the means.
inline void steps_by_adapters(const float* mean, const float* raw, float smallest,
                              const float* hidden, const float* hidden_bias, const float* output,
                              const float* output_bias, float least, float* steps, float* beta,
                              float* inner, float* outputs, long slots, long samples, long channels,
                              long width, long threads) {
    const long products = slots * samples * channels * width;
    for_samples(slots, samples, products, threads, [=](long j, long first, long n) {
        const Adapter adapter(hidden, hidden_bias, output, output_bias, channels, width, j);
        adapter.run(mean + first * channels, n, inner + (hidden ? first * width : 0),
                    outputs + first);
        for (long i = first; i < first + n; ++i) {
            beta[i] = outputs[i] < least ? least : outputs[i];
            steps[i] = positive(raw[j], smallest) * beta[i];
        }
    });
}

// What trains adapters of `slots` quantizers: figures that the forward pass kept, and gradients to
// outputs and hidden activations before their ReLUs, # shape: (slots, samples) and (..., width).
class AdapterGradients {
  public:
    AdapterGradients(const float* mean, const float* raw, float smallest, const float* hidden,
                     const float* output, float least, const float* beta, const float* inner,
                     const float* outputs, long slots, long samples, long channels, long width)
        : mean_(mean), raw_(raw), hidden_(hidden), output_(output), beta_(beta),
          last_(hidden ? inner : mean), outputs_(outputs), smallest_(smallest), least_(least),
          slots_(slots), samples_(samples), channels_(channels), width_(width),
          to_out_(slots * samples), to_inner_(hidden ? slots * samples * width : 0) {}

    // Gradients to the means of n samples from `first` on, of the j-th slot, from those to the steps
    // of all.
    void pull(const float* to_steps, long j, long first, long n, float* to_means) {
        const Adapter adapter(hidden_, nullptr, output_, nullptr, channels_, width_, j);
        const float step = positive(raw_[j], smallest_);
        for (long i = first; i < first + n; ++i)
            to_out_[i] = outputs_[i] >= least_ ? to_steps[i] * step : 0.0f;
        adapter.pull(&to_out_[first], n, last_ + first * width_,
                     hidden_ ? &to_inner_[first * width_] : nullptr, to_means + first * channels_);
    }

    // Once all are pulled: gradients to the raw steps (with LSQ's scale 1 / sqrt(qmax features)) and
    // to the adapters.
    void total(const float* to_steps, const float* qmax, float features, float* grad_raw,
               float* grad_hidden, float* grad_hidden_bias, float* grad_output,
               float* grad_output_bias, long threads) const {
        for (long j = 0; j < slots_; ++j) {
            double to_step = 0.0, to_bias = 0.0;
            float* own = grad_output + j * width_;
            std::fill(own, own + width_, 0.0f);
            for (long i = j * samples_; i < (j + 1) * samples_; ++i) {
                to_step += static_cast<double>(to_steps[i]) * beta_[i];
                to_bias += to_out_[i];
            }
            add_all_scaled(&to_out_[j * samples_], 1, last_ + j * samples_ * width_, samples_, own,
                           width_);
            const float scale = 1.0f / std::sqrt(qmax[j] * features);
            grad_raw[j] = static_cast<float>(to_step) * (raw_[j] < 0.0f ? -scale : scale);
            grad_output_bias[j] = static_cast<float>(to_bias);
        }
        if (!hidden_) return;
        in_threads(slots_ * width_, products(), threads, [=](long row) {
            const long j = row / width_;
            const float* by = &to_inner_[j * samples_ * width_ + row % width_];
            float *own = grad_hidden + row * channels_, bias = 0.0f;
            std::fill(own, own + channels_, 0.0f);
            for (long i = 0; i < samples_; ++i) bias += by[i * width_];
            add_all_scaled(by, width_, mean_ + j * samples_ * channels_, samples_, own, channels_);
            grad_hidden_bias[row] = bias;
        });
    }

    long products() const { return slots_ * samples_ * channels_ * width_; }

  private:
    const float *mean_, *raw_, *hidden_, *output_, *beta_, *last_, *outputs_;
    float smallest_, least_;
    long slots_, samples_, channels_, width_;
    std::vector<float> to_out_, to_inner_;
};

// All of it: gradients to the means, to the raw steps and to the adapters, from those to the steps.
inline void adapters_backward(
    const float* mean, const float* to_steps, const float* raw, float smallest,
    const float* qmax, float features, const float* hidden, const float* output, float least,
    const float* beta, const float* inner, const float* outputs, float* to_means, float* grad_raw,
    float* grad_hidden, float* grad_hidden_bias, float* grad_output, float* grad_output_bias,
    long slots, long samples, long channels, long width, long threads) {
    AdapterGradients gradients(mean, raw, smallest, hidden, output, least, beta, inner, outputs,
                               slots, samples, channels, width);
    for_samples(slots, samples, gradients.products(), threads, [&](long j, long first, long n) {
        gradients.pull(to_steps, j, first, n, to_means);
    });
    gradients.total(to_steps, qmax, features, grad_raw, grad_hidden, grad_hidden_bias, grad_output,
                    grad_output_bias, threads);
}

}  // namespace
