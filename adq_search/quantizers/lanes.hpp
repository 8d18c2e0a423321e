// Loops over values, LANES at a time where the processor has registers for as many, and one by one
// for the rest. A loop's body is written once, for `floats` and for `float`.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "native.hpp"

namespace {

// Vectors of the compiler's own arithmetic: 16 values, in whatever registers the processor has.
constexpr long LANES = 16;
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

// Narrow integers as wide ones, and back; compilers take them one by one.
inline ints widened(const uint8_t* from) {
#ifdef __AVX512F__
    return reinterpret_cast<ints>(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    bytes narrow;
    std::memcpy(&narrow, from, sizeof narrow);
    return __builtin_convertvector(narrow, ints);
#endif
}

inline ints widened(const uint16_t* from) {
#ifdef __AVX512F__
    return reinterpret_cast<ints>(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#else
    shorts narrow;
    std::memcpy(&narrow, from, sizeof narrow);
    return __builtin_convertvector(narrow, ints);
#endif
}

inline void narrow(uint8_t* to, ints wide) {
#ifdef __AVX512F__
    const __m128i found = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(wide));
#else
    const bytes found = __builtin_convertvector(wide, bytes);
#endif
    std::memcpy(to, &found, sizeof found);
}

inline void narrow(uint16_t* to, ints wide) {
#ifdef __AVX512F__
    const __m256i found = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(wide));
#else
    const shorts found = __builtin_convertvector(wide, shorts);
#endif
    std::memcpy(to, &found, sizeof found);
}

inline floats lanes(const float* from) {
    floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline floats lanes(const bfloat16* from) {
    return reinterpret_cast<floats>(widened(&from->bits) << 16);
}

inline void put(float* to, floats values) { std::memcpy(to, &values, sizeof values); }

// As `store` does; where the processor rounds by itself, what is below 2^-126 becomes 0.
inline void put(bfloat16* to, floats values) {
#ifdef __AVX512BF16__
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(values));
    std::memcpy(&to->bits, &rounded, sizeof rounded);
#else
    const ints bits = reinterpret_cast<ints>(values);
    const ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    narrow(&to->bits, values == values ? rounded : 0x7fc0 + ints{});
#endif
}

// Halves are added to each other: no addition waits for fifteen others.
inline float sum_of(floats values) {
    for (long width = LANES / 2; width > 0; width /= 2)
        for (long j = 0; j < width; ++j) values[j] += values[j + width];
    return values[0];
}

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

#ifdef __AVX512F__
inline __m512 raw(floats values) { return reinterpret_cast<__m512>(values); }

inline floats clip(floats z, float low, float high) {
    // Of NaN and a bound, the second operand is taken.
    const __m512 above = _mm512_max_ps(_mm512_set1_ps(low), raw(z));
    return reinterpret_cast<floats>(_mm512_min_ps(_mm512_set1_ps(high), above));
}

inline floats nearest(floats z) {
    return reinterpret_cast<floats>(
        _mm512_roundscale_ps(raw(z), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline floats within(floats value, float low, float high, floats then) {
    const __mmask16 above = _mm512_cmp_ps_mask(raw(value), _mm512_set1_ps(low), _CMP_GT_OQ);
    const __mmask16 inside =
        _mm512_mask_cmp_ps_mask(above, raw(value), _mm512_set1_ps(high), _CMP_LT_OQ);
    return reinterpret_cast<floats>(_mm512_maskz_mov_ps(inside, raw(then)));
}

// A division takes as long as ten products. One step of Newton's from v (1 / s) ends at the quotient
// to the last bit (Markstein, IBM J. Res. Dev. 34, 1990), short of overflow, and beyond 2^20 no code depends on that.
inline floats quotient(floats v, float s, float per_s) {
    const __m512 by = _mm512_set1_ps(per_s), near = _mm512_mul_ps(raw(v), by);
    const __m512 rest = _mm512_fnmadd_ps(near, _mm512_set1_ps(s), raw(v));
    const __mmask16 is_small =
        _mm512_cmp_ps_mask(_mm512_abs_ps(near), _mm512_set1_ps(0x1p20f), _CMP_LT_OQ);
    return reinterpret_cast<floats>(_mm512_mask3_fmadd_ps(rest, by, near, is_small));
}

// What is read after `put` wrote it.
inline floats as_stored(floats values, const float*) { return values; }
inline floats as_stored(floats values, const bfloat16*) {
#ifdef __AVX512BF16__
    const __m256i kept = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(raw(values)));
    return reinterpret_cast<floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(kept), 16));
#else
    bfloat16 kept[LANES];
    put(kept, values);
    return lanes(kept);
#endif
}
#endif

// Call `body(i, kind)` for values from i on, as many as `kind` has.
template <class Body>
inline void for_values(long size, const Body body) {
    long i = 0;
#ifdef __AVX512F__
    for (; i + LANES <= size; i += LANES) body(i, floats{});
    for (; i < size; ++i) body(i, 0.0f);
#else
#pragma omp simd
    for (i = 0; i < size; ++i) body(i, 0.0f);
#endif
}

// The sum of what it returns.
template <class Body>
inline float sum_over(long size, const Body body) {
    float sum = 0.0f;
    long i = 0;
#ifdef __AVX512F__
    floats sums = {};
    for (; i + LANES <= size; i += LANES) sums += body(i, floats{});
    sum = sum_of(sums);
    for (; i < size; ++i) sum += body(i, 0.0f);
#else
#pragma omp simd reduction(+ : sum)
    for (i = 0; i < size; ++i) sum += body(i, 0.0f);
#endif
    return sum;
}

}  // namespace
