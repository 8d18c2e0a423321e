// ASQ's adapters [Zhou2025, algorithm 1]: from channel means to a step for each sample, and back.
//
// The arithmetic is that of `Adapter` in `asq.py`; products are summed in another order.

#pragma once

#include <cmath>
#include <vector>

#include "blocks.hpp"

namespace {

// With fewer products a second thread costs more than it brings.
constexpr long PRODUCTS_WORTH_THREADS = 1L << 18;

inline float rectified(float z) { return z < 0.0f ? 0.0f : z; }

inline float dot(const float* __restrict a, const float* __restrict b, long n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

inline void add_scaled(float scale, const float* __restrict a, float* __restrict to, long n) {
#pragma omp simd
    for (long i = 0; i < n; ++i) to[i] += scale * a[i];
}

// Call `work(i)` for i < n.
template <class Work>
void in_threads(long n, long products, long threads, const Work work) {
    if (products < PRODUCTS_WORTH_THREADS) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long i = 0; i < n; ++i) work(i);
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

    // Activations of a sample: hidden ones, where there are any, and the output.
    float run(const float* mean, float* inner) const {
        if (hidden == nullptr) return rectified(dot(mean, output, channels) + *output_bias);
        for (long k = 0; k < width; ++k)
            inner[k] = rectified(dot(mean, hidden + k * channels, channels) + hidden_bias[k]);
        return rectified(dot(inner, output, width) + *output_bias);
    }

    // Gradients to a sample's hidden activations before their ReLU, and to its means.
    void pull(float to_out, const float* inner, float* to_inner, float* to_mean) const {
        if (hidden == nullptr) {
            for (long c = 0; c < channels; ++c) to_mean[c] = to_out * output[c];
            return;
        }
        std::fill(to_mean, to_mean + channels, 0.0f);
        for (long k = 0; k < width; ++k) {
            to_inner[k] = inner[k] > 0.0f ? to_out * output[k] : 0.0f;
            add_scaled(to_inner[k], hidden + k * channels, to_mean, channels);
        }
    }
};

}  // namespace
