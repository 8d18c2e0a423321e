// Tensors line by line.
//
// A tensor comes channels last: pixels one after the other, each with its channels side by side.
// Several pixels make a line of about WIDTH values, for which figures of the channels are repeated.
// Passes go along lines; those that only sum go down the columns of some lines, and their sums stay
// in registers. Sums are taken in blocks of lines, or of samples, so that they do not depend on the number of
// threads.

#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "adapter.hpp"
#include "blocks.hpp"

namespace {

// About as many values make a line.
constexpr long WIDTH = 512;
// Values of some lines that stay in the nearest cache.
constexpr long PIECE = 4096;
constexpr long VALUES_OF_BLOCK = 32768;

template <class V>
inline void add_at(float* sums, long j, V values) {
    set(sums, j, at(sums, j, values) + values);
}

template <class V, size_t N>
inline void add_each(std::array<V, N>& sums, const std::array<V, N>& terms) {
    for (size_t k = 0; k < N; ++k) sums[k] += terms[k];
}

struct Lines {
    long channels, pixels, size, width, in_block, blocks;

    Lines(long pixels, long channels)
        : channels(channels), pixels(pixels), size(pixels * channels),
          width(std::min(pixels, pixels_of_line(channels)) * channels),
          in_block(std::max(1L, VALUES_OF_BLOCK / width) * width),
          blocks((size + in_block - 1) / in_block) {}

    // Figures of the channels for each place in a line.
    std::vector<float> repeated(const float* of_channels) const {
        std::vector<float> of_line(width);
        for (long begin = 0; begin < width; begin += channels)
            std::copy(of_channels, of_channels + channels, of_line.begin() + begin);
        return of_line;
    }
    std::vector<float> repeated(const std::vector<float>& of_channels) const {
        return repeated(of_channels.data());
    }

    // Add to sums by place, of N terms of the values from `begin`, where a line begins, to `end`. For
    // the places from j on, as many as `kind` has, `terms(j, kind)` returns what finds the terms at i.
    // Sums stay in registers all the way down some lines.
    template <size_t N, class Terms>
    void sum_down(long begin, long end, const std::array<float*, N> sums, const Terms terms) const {
        const long step = std::max(1L, PIECE / width) * width;
        for (long first = begin; first < end; first += step) {
            const long last = std::min(end, first + step);
            const long whole = first + (last - first) / width * width;
            long j = 0;
            for (; j + 2 * LANES <= width; j += 2 * LANES) {
                const auto one = terms(j, floats{}), two = terms(j + LANES, floats{});
                std::array<floats, N> sums_one = {}, sums_two = {};
                for (long i = first + j; i < whole; i += width) {
                    add_each(sums_one, one(i));
                    add_each(sums_two, two(i + LANES));
                }
                for (size_t k = 0; k < N; ++k) {
                    add_at(sums[k], j, sums_one[k]);
                    add_at(sums[k], j + LANES, sums_two[k]);
                }
            }
            const auto sum_rest = [&](long from, long to, long place, auto kind) {
                const auto own = terms(place, kind);
                std::array<decltype(kind), N> found = {};
                for (long i = from + place; i < to; i += width) add_each(found, own(i));
                for (size_t k = 0; k < N; ++k) add_at(sums[k], place, found[k]);
            };
            for_values(width - j, [&](long k, auto kind) { sum_rest(first, whole, j + k, kind); });
            for_values(last - whole, [&](long k, auto kind) { sum_rest(whole, last, k, kind); });
        }
    }

    // Call `use(at, size)` for each line of the values from `begin` to `end`; the last may be shorter.
    template <class Use>
    void along(long begin, long end, const Use use) const {
        for (; begin < end; begin += width) use(begin, std::min(width, end - begin));
    }

    // Call `work(block, begin, end)` for each block.
    template <class Work>
    void each(long threads, const Work work) const {
        if (size < VALUES_WORTH_THREADS) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (long block = 0; block < blocks; ++block)
            work(block, block * in_block, std::min(size, (block + 1) * in_block));
    }

  private:
    // As many as fill whole registers, where these are not many more.
    static long pixels_of_line(long channels) {
        const long least = (WIDTH + channels - 1) / channels;
        for (long n = least; n < least + 2 * LANES && n * channels < 2 * WIDTH; ++n)
            if (n * channels % (2 * LANES) == 0) return n;
        return least;
    }
};

// Bytes of samples that are passed over again soon, and so should stay near.
constexpr long NEAR_BYTES = 1L << 18;

// Lines of each sample, and figures by sample and channel.
struct Samples {
    long n;
    Lines lines;

    Samples(long n, long pixels, long channels) : n(n), lines(pixels, channels) {}

    long begin(long sample) const { return sample * lines.size; }

    // `Lines::along` and `Lines::sum_down` one sample.
    template <class Use>
    void along(long sample, const Use use) const {
        lines.along(begin(sample), begin(sample + 1), use);
    }
    template <size_t N, class Terms>
    void sum_down(long sample, const std::array<float*, N> sums, const Terms terms) const {
        lines.sum_down(begin(sample), begin(sample + 1), sums, terms);
    }
    // Call `work(first, last)` for groups of samples, as many as adapters take at once or as stay near.
    template <class Work>
    void each_group(long bytes_of_value, long threads, const Work work) const {
        const long near = NEAR_BYTES / (lines.size * bytes_of_value);
        const long in_group = std::max(1L, std::min(ROWS, near)), groups = (n + in_group - 1) / in_group;
        if (n * lines.size < VALUES_WORTH_THREADS) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (long group = 0; group < groups; ++group)
            work(group * in_group, std::min(n, (group + 1) * in_group));
    }
    // Call `work(sample)` for each sample.
    template <class Work>
    void each(long threads, const Work work) const {
        if (n * lines.size < VALUES_WORTH_THREADS) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (long sample = 0; sample < n; ++sample) work(sample);
    }
    // Sums of a line's places by channel; of pixels, halves are added to each other while they are even.
    void fold(std::vector<float>& of_line, float* of_channels) const {
        float* sums = of_line.data();
        const auto add = [=](const float* own, long size) {
            for_values(size, [=](long j, auto kind) { add_at(sums, j, at(own, j, kind)); });
        };
        long n = lines.width;
        for (; n % (2 * lines.channels) == 0; n /= 2) add(sums + n / 2, n / 2);
        for (long from = lines.channels; from < n; from += lines.channels)
            add(sums + from, lines.channels);
        std::copy(of_line.begin(), of_line.begin() + lines.channels, of_channels);
    }
};

}  // namespace
