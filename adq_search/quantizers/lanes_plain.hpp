// Registers of 4 values in the compiler's own arithmetic, for all other processors. Included by
// `lanes.hpp`, which says what the names mean.

#pragma once

#include <cmath>

#include "native.hpp"

namespace {

template <class Narrow>
inline ints widened(const Narrow* from) {
    ints wide;
    for (long j = 0; j < LANES; ++j) wide[j] = from[j];
    return wide;
}

template <class Narrow>
inline void narrow(Narrow* to, ints wide) {
    for (long j = 0; j < LANES; ++j) to[j] = static_cast<Narrow>(wide[j]);
}

inline floats clip(floats z, float low, float high) {
    z = z < low ? low + floats{} : z;
    return z > high ? high + floats{} : z;
}

inline floats nearest(floats z) {
    for (long j = 0; j < LANES; ++j) z[j] = std::nearbyint(z[j]);
    return z;
}

inline floats within(floats value, float low, float high, floats then) {
    return (value > low) & (value < high) ? then : floats{};
}

inline floats quotient(floats v, float s, float) { return v / s; }

// Two figures of each value, one after the other.
inline void put_pairs(float* to, floats first, floats second) {
    for (long j = 0; j < LANES; ++j) to[2 * j] = first[j], to[2 * j + 1] = second[j];
}

// Entries of any table.
inline floats looked_up(const float* table, ints index) {
    floats found;
    for (long j = 0; j < LANES; ++j) found[j] = table[index[j]];
    return found;
}

// Up to NEAR figures, of which index 0 up to N - 1 are asked for.
template <long N>
class NearTable {
  public:
    NearTable() = default;
    NearTable(const float* table, long n) { std::memcpy(entries_, table, n * sizeof(float)); }
    floats at(ints index) const { return looked_up(entries_, index); }

  private:
    float entries_[N] = {};
};

}  // namespace
