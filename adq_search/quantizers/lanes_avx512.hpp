// Registers of AVX-512: 16 values. Included by `lanes.hpp`, which says what the names mean.

#pragma once

#include <immintrin.h>

#include "native.hpp"

namespace {

inline __m512 raw(floats values) { return reinterpret_cast<__m512>(values); }
inline __m512i raw(ints values) { return reinterpret_cast<__m512i>(values); }

inline ints widened(const uint8_t* from) {
    return reinterpret_cast<ints>(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

inline ints widened(const uint16_t* from) {
    return reinterpret_cast<ints>(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}

inline void narrow(uint8_t* to, ints wide) {
    const __m128i found = _mm512_cvtepi32_epi8(raw(wide));
    std::memcpy(to, &found, sizeof found);
}

inline void narrow(uint16_t* to, ints wide) {
    const __m256i found = _mm512_cvtepi32_epi16(raw(wide));
    std::memcpy(to, &found, sizeof found);
}

#ifdef __AVX512BF16__
// As `store` does; but what is below 2^-126 becomes 0.
inline void put(bfloat16* to, floats values) {
    const __m256bh rounded = _mm512_cvtneps_pbh(raw(values));
    std::memcpy(&to->bits, &rounded, sizeof rounded);
}

inline floats as_stored(floats values, const bfloat16*) {
    const __m256i kept = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(raw(values)));
    return reinterpret_cast<floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(kept), 16));
}
#endif

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

// Two figures of each value, one after the other.
inline void put_pairs(float* to, floats first, floats second) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    _mm512_storeu_ps(to, _mm512_permutex2var_ps(raw(first), low, raw(second)));
    _mm512_storeu_ps(to + LANES, _mm512_permutex2var_ps(raw(first), high, raw(second)));
}

// Up to NEAR figures, of which index 0 up to N - 1 are asked for.
template <long N>
class NearTable {
  public:
    NearTable() = default;
    NearTable(const float* table, long n) { std::memcpy(&entries_, table, n * sizeof(float)); }
    floats at(ints index) const {
        return reinterpret_cast<floats>(_mm512_permutexvar_ps(raw(index), raw(entries_)));
    }

  private:
    floats entries_ = {};
};

// Entries of any table.
inline floats looked_up(const float* table, ints index) {
    return reinterpret_cast<floats>(_mm512_i32gather_ps(raw(index), table, sizeof(float)));
}

}  // namespace
