// N2UQ's parameters: from what is trained to what the passes use, and the gradients back.
//
// The arithmetic is that of `_thresholds.py`, [Liu2022] Eqs. 8-10.

#pragma once

#include <vector>

#include "blocks.hpp"

namespace {

// Trained parameters of some quantizers, in tables with `room` for each, and the constants of their
// use.
struct Trained {
    const float *start, *widths, *in_scale, *out_scale;
    const int64_t* counts;
    long room;
    float narrowest, smallest;
};

// Those of the j-th quantizer as they are used.
struct Used {
    long m;
    float beta, step;
    std::vector<float> a, knots, cuts, slopes;

    Used(const Trained& trained, long j)
        : m(trained.counts[j]), beta(positive(trained.in_scale[j], trained.smallest)),
          step(positive(trained.out_scale[j], trained.smallest) * (2.0f / m)),
          a(m), knots(m + 1), cuts(m), slopes(m + 1, 0.0f) {
        double sum = 0.0;
        knots[0] = trained.start[j];
        for (long i = 0; i < m; ++i) {
            const float width = trained.widths[j * trained.room + i];
            a[i] = width < trained.narrowest ? trained.narrowest : width;
            sum += a[i];
            knots[i + 1] = trained.start[j] + static_cast<float>(sum);
            cuts[i] = knots[i] + a[i] / 2;
            slopes[i] = step / a[i] * beta;
        }
    }

    // `sums` as `thresholds_backward` of `kernels.cpp` has them.
    void gradients(const Trained& trained, long j, const float* sums, float* grad_start,
                   float* grad_widths, float* grad_in, float* grad_out) const {
        const float *r = sums, *distance = sums + m + 1;
        double pushed = 0.0, to_beta = 0.0;
        for (long i = 0; i < m; ++i) {
            pushed += step / a[i] * r[i];
            to_beta += step / a[i] * (distance[i] + knots[i] * static_cast<double>(r[i]));
        }
        double before = 0.0;
        for (long i = 0; i < m; ++i) {
            // Every interval pushes those after it.
            before += step / a[i] * r[i];
            const bool is_used = trained.widths[j * trained.room + i] >= trained.narrowest;
            const double found = before - pushed - step / a[i] * distance[i] / a[i];
            grad_widths[j * trained.room + i] = is_used ? static_cast<float>(found) : 0.0f;
        }
        const double to_out = sums[2 * m + 2] * (2.0 / m);
        to_beta /= beta;
        grad_start[j] = static_cast<float>(-pushed);
        grad_in[j] = static_cast<float>(trained.in_scale[j] < 0.0f ? -to_beta : to_beta);
        grad_out[j] = static_cast<float>(trained.out_scale[j] < 0.0f ? -to_out : to_out);
    }
};

std::vector<Used> used_by_all(const Trained& trained, long n) {
    std::vector<Used> found;
    for (long j = 0; j < n; ++j) found.emplace_back(trained, j);
    return found;
}

}  // namespace
