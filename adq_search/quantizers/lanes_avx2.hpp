// Registers of AVX2: 8 values. Included by `lanes.hpp`, which says what the names mean.

#pragma once

#include <immintrin.h>

#include "native.hpp"

namespace {

inline __m256 raw(floats values) { return reinterpret_cast<__m256>(values); }
inline __m256i raw(ints values) { return reinterpret_cast<__m256i>(values); }

inline ints widened(const uint8_t* from) {
    return reinterpret_cast<ints>(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

inline ints widened(const uint16_t* from) {
    return reinterpret_cast<ints>(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

// The lower 16 bits of each.
inline __m128i shorts_of(ints wide) {
    const __m256i own = raw(wide & 0xffff), packed = _mm256_packus_epi32(own, own);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
}

inline void narrow(uint8_t* to, ints wide) {
    const __m128i found = shorts_of(wide & 0xff), packed = _mm_packus_epi16(found, found);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), packed);
}

inline void narrow(uint16_t* to, ints wide) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), shorts_of(wide));
}

inline floats clip(floats z, float low, float high) {
    // Of NaN and a bound, the second operand is taken.
    const __m256 above = _mm256_max_ps(_mm256_set1_ps(low), raw(z));
    return reinterpret_cast<floats>(_mm256_min_ps(_mm256_set1_ps(high), above));
}

inline floats nearest(floats z) {
    return reinterpret_cast<floats>(
        _mm256_round_ps(raw(z), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline floats within(floats value, float low, float high, floats then) {
    const __m256 above = _mm256_cmp_ps(raw(value), _mm256_set1_ps(low), _CMP_GT_OQ);
    const __m256 below = _mm256_cmp_ps(raw(value), _mm256_set1_ps(high), _CMP_LT_OQ);
    return reinterpret_cast<floats>(_mm256_and_ps(_mm256_and_ps(above, below), raw(then)));
}

// Divisions of 8 values take no longer than what would stand in for them.
inline floats quotient(floats v, float s, float) { return v / s; }

// Two figures of each value, one after the other.
inline void put_pairs(float* to, floats first, floats second) {
    const __m256 low = _mm256_unpacklo_ps(raw(first), raw(second));
    const __m256 high = _mm256_unpackhi_ps(raw(first), raw(second));
    _mm256_storeu_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(to + LANES, _mm256_permute2f128_ps(low, high, 0x31));
}

// Up to NEAR figures, of which index 0 up to N - 1 are asked for.
template <long N>
class NearTable {
  public:
    NearTable() = default;
    NearTable(const float* table, long n) { std::memcpy(entries_, table, n * sizeof(float)); }
    floats at(ints index) const {
        const __m256 low = _mm256_permutevar8x32_ps(raw(entries_[0]), raw(index));
        if constexpr (N <= LANES) return reinterpret_cast<floats>(low);
        const __m256 high = _mm256_permutevar8x32_ps(raw(entries_[1]), raw(index));
        const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(raw(index), 28));
        return reinterpret_cast<floats>(_mm256_blendv_ps(low, high, is_high));
    }

  private:
    floats entries_[NEAR / LANES] = {};
};

// Entries of any table.
inline floats looked_up(const float* table, ints index) {
    return reinterpret_cast<floats>(_mm256_i32gather_ps(table, raw(index), sizeof(float)));
}

}  // namespace
