// Tensors line by line.
//
// A tensor comes channels last: pixels one after the other, each with its channels side by side.
// Several pixels make a line of about WIDTH values, for which figures of the channels are repeated.
// Sums are taken in blocks of lines, or of samples, so that they do not depend on the number of
// threads.

#pragma once

#include <algorithm>
#include <vector>

#include "adapter.hpp"
#include "blocks.hpp"

namespace {

constexpr long WIDTH = 512;
constexpr long VALUES_OF_BLOCK = 32768;

template <class V>
inline void add_at(float* sums, long j, V values) {
    set(sums, j, at(sums, j, values) + values);
}

// Values are added to sums by their place in the line.
template <class T>
void add_line(const T* y, float* sum, long size) {
    for_values(size, [=](long j, auto kind) { add_at(sum, j, at(y, j, kind)); });
}

struct Lines {
    long channels, pixels, size, width, in_block, blocks;

    Lines(long pixels, long channels) : channels(channels), pixels(pixels), size(pixels * channels) {
        width = std::min(pixels, (WIDTH + channels - 1) / channels) * channels;
        in_block = std::max(1L, VALUES_OF_BLOCK / width) * width;
        blocks = (size + in_block - 1) / in_block;
    }

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

// Bytes of samples that are passed over again soon, and so should stay near.
constexpr long NEAR_BYTES = 1L << 18;

// Lines of each sample, and figures by sample and channel.
struct Samples {
    long n;
    Lines lines;

    Samples(long n, long pixels, long channels) : n(n), lines(pixels, channels) {}

    // Call `use(begin, size)` for each line of a sample.
    template <class Use>
    void lines_of(long sample, const Use use) const {
        for (long begin = 0; begin < lines.size; begin += lines.width)
            use(sample * lines.size + begin, std::min(lines.width, lines.size - begin));
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
    // Call `work(sample, lines)` for each sample, where `lines(use)` is `lines_of` it.
    template <class Work>
    void each(long threads, const Work work) const {
        if (n * lines.size < VALUES_WORTH_THREADS) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (long sample = 0; sample < n; ++sample)
            work(sample, [=](const auto use) { lines_of(sample, use); });
    }
    // Sums of a line's places by channel; of pixels, halves are added to each other while they are even.
    void fold(std::vector<float>& of_line, float* of_channels) const {
        long n = lines.width;
        for (; n % (2 * lines.channels) == 0; n /= 2) add_line(of_line.data() + n / 2, of_line.data(), n / 2);
        for (long at = lines.channels; at < n; at += lines.channels)
            add_line(of_line.data() + at, of_line.data(), lines.channels);
        std::copy(of_line.begin(), of_line.begin() + lines.channels, of_channels);
    }
};

}  // namespace
