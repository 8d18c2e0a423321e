// Sorted levels and cuts: which lies below a value, which is nearest, and sums by interval.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "lanes.hpp"

namespace {

// Up to this many cuts, comparing with each takes no longer than searching.
constexpr long FEW_CUTS = 3;

// Entries of a table that is too long for registers.
struct FarTable {
    const float* entries;
    floats at(ints index) const { return looked_up(entries, index); }
};

// Call `use` with tables of n entries each, in registers where they fit there.
template <class Use, class... Tables>
inline auto with_tables(long n, const Use use, const Tables*... tables) {
    return n <= NEAR ? use(NearTable<NEAR>(tables, n)...) : use(FarTable{tables}...);
}

// Sorted cuts. Values are compared with each of a few; of many, with one a level of a search tree.
class Cuts {
  public:
    explicit Cuts(std::vector<float> sorted) : sorted_(std::move(sorted)) {
        const long n = static_cast<long>(sorted_.size());
        if (n <= FEW_CUTS) return;
        while ((1L << depth_) - 1 < n) ++depth_;
        // Level d has 2^d nodes; node i lies where it divides what the levels above leave.
        for (long d = 0; d < depth_; ++d) {
            for (long i = 0; i < 1L << d; ++i) {
                const long at = ((2 * i + 1) << (depth_ - 1 - d)) - 1;
                nodes_.push_back(at < n ? sorted_[at] : INFINITY);
            }
            if (d < N_NARROW) narrow_[d] = {level(d), 1L << d};
            if (d == N_NARROW) wide_ = {level(d), 1L << d};
        }
    }

    // How many lie below each value of a strip; none for NaN. Strips would go through memory if it
    // were a call.
    [[gnu::always_inline]] IntStrip below(const Strip& z) const {
        IntStrip count = {};
        if (depth_ == 0) {
            for (const float cut : sorted_)
                for (long j = 0; j < REGISTERS; ++j) count.of[j] -= z.of[j] > cut;
            return count;
        }
        for (long j = 0; j < REGISTERS; ++j) count.of[j] -= z.of[j] > nodes_[0];
        for (long d = 1; d < depth_ && d < N_NARROW; ++d) step(z, count, narrow_[d]);
        if (depth_ > N_NARROW) step(z, count, wide_);
        for (long d = N_NARROW + 1; d < depth_; ++d) step(z, count, FarTable{level(d)});
        return count;
    }

  private:
    // Levels of up to 8 nodes; the next one has `NEAR`, and those behind lie in memory.
    static constexpr long N_NARROW = 4;

    template <class Nodes>
    static void step(const Strip& z, IntStrip& count, const Nodes& nodes) {
        for (long j = 0; j < REGISTERS; ++j)
            count.of[j] = count.of[j] + count.of[j] - (z.of[j] > nodes.at(count.of[j]));
    }
    const float* level(long d) const { return nodes_.data() + (1L << d) - 1; }

    std::vector<float> sorted_, nodes_;
    long depth_ = 0;
    NearTable<8> narrow_[N_NARROW];
    NearTable<NEAR> wide_;
};

// Sorted levels, and the cuts in the middle between them.
class Levels {
  public:
    Levels(const float* levels, long n) : n_(n), levels_(levels), cuts_(between(levels, n)) {}

    // Call `use(nearest)`, where `nearest(z, index)` finds the nearest level of each value of a
    // strip, and its index; NaN stays.
    template <class Use>
    auto search(const Use use) const {
        const auto search_in = [&](const auto table) {
            return use([&, table](const Strip& z, IntStrip& index) {
                index = cuts_.below(z);
                Strip found;
                for (long j = 0; j < REGISTERS; ++j)
                    found.of[j] = z.of[j] == z.of[j] ? table.at(index.of[j]) : z.of[j];
                return found;
            });
        };
        return with_tables(n_, search_in, levels_);
    }

  private:
    static Cuts between(const float* levels, long n) {
        std::vector<float> cuts(n - 1);
        for (long k = 0; k + 1 < n; ++k) cuts[k] = (levels[k + 1] + levels[k]) / 2;
        return Cuts(std::move(cuts));
    }

    long n_;
    const float* levels_;
    Cuts cuts_;
};

// Sums of two figures over the values of each interval 1..n; what lies in interval 0 is left out.
// Neighbouring values go to different tables, so that no addition waits for the one before, and what
// some thousand values gave is summed in double precision.
class IntervalSums {
  public:
    explicit IntervalSums(long n) : n_(n), total_(2 * n), tables_((n + 1) * TABLES) {}

    // What is added of a strip of values.
    class Addends {
      public:
        // Of the j-th register: two figures, and the interval.
        void set(long j, floats first, floats second, ints interval) {
            put_pairs(figures_ + 2 * j * LANES, first, second);
            put(offsets_ + j * LANES, interval * static_cast<int32_t>(TABLES));
        }

      private:
        friend class IntervalSums;
        float figures_[2 * STRIP];
        int32_t offsets_[STRIP];
    };

    // Of up to STRIP values.
    void add(Addends& addends, long size) {
        for (long i = size; i < STRIP; ++i) addends.offsets_[i] = 0;
        for (long i = 0; i < STRIP; i += TABLES) {
            for (long table = 0; table < TABLES; ++table) {
                Pair pair;
                std::memcpy(&pair, addends.figures_ + 2 * (i + table), sizeof pair);
                tables_[static_cast<uint32_t>(addends.offsets_[i + table]) + table] += pair;
            }
        }
        n_added_ += STRIP;
        if (n_added_ >= MOST_ADDED) close();
    }

    // The first figure's sums, then the second's, # shape: (2, n).
    void total(float* sums) {
        close();
        for (long k = 0; k < 2 * n_; ++k) sums[k] = static_cast<float>(total_[k]);
    }

  private:
    static constexpr long TABLES = 8, MOST_ADDED = 4096;
    typedef float Pair __attribute__((vector_size(2 * sizeof(float))));

    void close() {
        for (long k = 0; k < n_; ++k) {
            Pair* own = &tables_[(k + 1) * TABLES];
            Pair sum = {};
            for (long table = 0; table < TABLES; ++table) sum += own[table], own[table] = Pair{};
            total_[k] += sum[0];
            total_[n_ + k] += sum[1];
        }
        n_added_ = 0;
    }

    long n_, n_added_ = 0;
    std::vector<double> total_;
    std::vector<Pair> tables_;
};

// Sum tables of blocks: # shape: (blocks, n) to (n,).
void total_of(const std::vector<float>& parts, long n, float* sums) {
    std::vector<double> total(n);
    for (size_t begin = 0; begin < parts.size(); begin += n)
        for (long k = 0; k < n; ++k) total[k] += parts[begin + k];
    for (long k = 0; k < n; ++k) sums[k] = static_cast<float>(total[k]);
}

}  // namespace
