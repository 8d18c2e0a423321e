// Loops over values, LANES at a time, and one by one for the rest. A loop's body is written once, for
// `floats` and for `float`. What a register of `floats` can do that compilers do not find by
// themselves stands in one file an instruction set: `lanes_avx512.hpp`, `lanes_avx2.hpp`, and
// `lanes_plain.hpp` for all others.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "native.hpp"

namespace {

#if defined(__AVX512F__)
constexpr long LANES = 16;
#elif defined(__AVX2__)
constexpr long LANES = 8;
#else
constexpr long LANES = 4;
#endif

// Vectors of the compiler's own arithmetic, one register each.
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

inline floats lanes(const float* from) {
    floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline void put(float* to, floats values) { std::memcpy(to, &values, sizeof values); }
inline void put(int32_t* to, ints values) { std::memcpy(to, &values, sizeof values); }

// Entries that a `NearTable` can have: a table that stays in registers.
constexpr long NEAR = 16;

}  // namespace

#if defined(__AVX512F__)
#include "lanes_avx512.hpp"
#elif defined(__AVX2__)
#include "lanes_avx2.hpp"
#else
#include "lanes_plain.hpp"
#endif

namespace {

inline floats lanes(const bfloat16* from) {
    return reinterpret_cast<floats>(widened(&from->bits) << 16);
}

#ifndef __AVX512BF16__
// `rounded_bits` of `native.hpp`.
inline ints rounded_bits(floats values) {
    const ints bits = reinterpret_cast<ints>(values);
    const ints nearest = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
    return values == values ? nearest : 0x7fc00000 + ints{};
}

inline void put(bfloat16* to, floats values) { narrow(&to->bits, rounded_bits(values) >> 16); }

inline floats as_stored(floats values, const bfloat16*) {
    return reinterpret_cast<floats>(rounded_bits(values));
}
#endif

// What is read after `put` wrote it.
inline floats as_stored(floats values, const float*) { return values; }

// Halves are added to each other: no addition waits for all others.
inline float sum_of(floats values) {
    for (long width = LANES / 2; width > 0; width /= 2)
        for (long j = 0; j < width; ++j) values[j] += values[j + width];
    return values[0];
}
inline float sum_of(float value) { return value; }

// ---- What bodies are made of, for LANES values and for one ----

inline floats at(const float* from, long i, floats) { return lanes(from + i); }
inline floats at(const bfloat16* from, long i, floats) { return lanes(from + i); }
template <class T>
inline float at(const T* from, long i, float) {
    return load(from, i);
}
template <class T>
inline void set(T* to, long i, floats values) {
    put(to + i, values);
}
template <class T>
inline void set(T* to, long i, float value) {
    store(to, i, value);
}

// NaN stays.
inline float clip(float z, float low, float high) {
    z = z < low ? low : z;
    return z > high ? high : z;
}

// The nearest integer, ties to even.
inline float nearest(float z) { return std::nearbyint(z); }

// Values where others lie within bounds, else 0.
inline float within(float value, float low, float high, float then) {
    return (value > low) & (value < high) ? then : 0.0f;
}

// v / s, given 1 / s.
inline float quotient(float v, float s, float) { return v / s; }

// Call `body(i, kind)` for values from i on, as many as `kind` has.
template <class Body>
inline void for_values(long size, const Body body) {
    long i = 0;
    for (; i + LANES <= size; i += LANES) body(i, floats{});
    for (; i < size; ++i) body(i, 0.0f);
}

// The sum of what it returns.
template <class Body>
inline float sum_over(long size, const Body body) {
    floats sums = {};
    long i = 0;
    for (; i + LANES <= size; i += LANES) sums += body(i, floats{});
    float sum = sum_of(sums);
    for (; i < size; ++i) sum += body(i, 0.0f);
    return sum;
}

// ---- Strips: some registers at a time, so that none waits for the one before ----

constexpr long REGISTERS = 4;
constexpr long STRIP = REGISTERS * LANES;

struct Strip {
    floats of[REGISTERS];
};
struct IntStrip {
    ints of[REGISTERS];
};

// Up to STRIP values as they lie in memory; beyond `n` there is 0.
template <class T>
struct Whole {
    T values[STRIP] = {};

    Whole(const T* from, long n) { std::memcpy(values, from, n * sizeof(T)); }
};

template <class T>
inline Strip strip(const T* from, long n) {
    if (n < STRIP) return strip(Whole<T>(from, n).values, STRIP);
    Strip found;
    for (long j = 0; j < REGISTERS; ++j) found.of[j] = lanes(from + j * LANES);
    return found;
}

inline IntStrip strip(const uint8_t* from, long n) {
    if (n < STRIP) return strip(Whole<uint8_t>(from, n).values, STRIP);
    IntStrip found;
    for (long j = 0; j < REGISTERS; ++j) found.of[j] = widened(from + j * LANES);
    return found;
}

inline void put_lanes(uint8_t* to, ints values) { narrow(to, values); }
template <class T, class V>
inline void put_lanes(T* to, V values) {
    put(to, values);
}

template <class T, class S>
inline void put_strip(T* to, const S& values, long n) {
    if (n < STRIP) {
        T room[STRIP];
        put_strip(room, values, STRIP);
        std::memcpy(to, room, n * sizeof(T));
        return;
    }
    for (long j = 0; j < REGISTERS; ++j) put_lanes(to + j * LANES, values.of[j]);
}

// Call `body(i, n)` for strips of n values from i on.
template <class Body>
inline void for_strips(long size, const Body body) {
    long i = 0;
    for (; i + STRIP <= size; i += STRIP) body(i, STRIP);
    if (i < size) body(i, size - i);
}

}  // namespace
