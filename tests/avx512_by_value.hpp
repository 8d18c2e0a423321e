// The AVX-512 operations that `lanes_avx512.hpp` uses, one value at a time, as Intel's guide writes
// them down: so that its code runs where the processor has none. Included before all else.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace by_value {

template <class To, class From>
inline To as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class T>
struct Sixteen {
    T of[16];

    static Sixteen at(const void* from) {
        Sixteen found;
        std::memcpy(found.of, from, sizeof found.of);
        return found;
    }
    template <class Raw>
    static Sixteen in(const Raw& raw) { return at(&raw); }
    template <class F>
    static Sixteen made(const F f) {
        Sixteen found;
        for (int i = 0; i < 16; ++i) found.of[i] = f(i);
        return found;
    }
};
using Floats = Sixteen<float>;
using Ints = Sixteen<int32_t>;

template <class F>
inline __m512 floats(const F f) { return as<__m512>(Floats::made(f)); }
template <class F>
inline __m512i ints(const F f) { return as<__m512i>(Ints::made(f)); }

inline __m512 set1_ps(float x) { return floats([=](int) { return x; }); }
inline __m512i set1_epi32(int x) { return ints([=](int) { return x; }); }
template <class... X>
inline __m512i setr_epi32(X... x) { return as<__m512i>(Ints{{x...}}); }

// Of NaN and a number, the second operand is taken.
inline __m512 max_ps(__m512 a, __m512 b) {
    const Floats x = Floats::in(a), y = Floats::in(b);
    return floats([=](int i) { return x.of[i] > y.of[i] ? x.of[i] : y.of[i]; });
}
inline __m512 min_ps(__m512 a, __m512 b) {
    const Floats x = Floats::in(a), y = Floats::in(b);
    return floats([=](int i) { return x.of[i] < y.of[i] ? x.of[i] : y.of[i]; });
}
inline __m512 mul_ps(__m512 a, __m512 b) {
    const Floats x = Floats::in(a), y = Floats::in(b);
    return floats([=](int i) { return x.of[i] * y.of[i]; });
}
inline __m512 abs_ps(__m512 a) {
    const Floats x = Floats::in(a);
    return floats([=](int i) { return std::fabs(x.of[i]); });
}
// To the nearest integer, whatever `how`: no other is asked for.
inline __m512 roundscale_ps(__m512 a, int) {
    const Floats x = Floats::in(a);
    return floats([=](int i) { return std::nearbyint(x.of[i]); });
}
inline __m512 fnmadd_ps(__m512 a, __m512 b, __m512 c) {
    const Floats x = Floats::in(a), y = Floats::in(b), z = Floats::in(c);
    return floats([=](int i) { return std::fma(-x.of[i], y.of[i], z.of[i]); });
}
inline __m512 mask3_fmadd_ps(__m512 a, __m512 b, __m512 c, __mmask16 mask) {
    const Floats x = Floats::in(a), y = Floats::in(b), z = Floats::in(c);
    return floats([=](int i) {
        return mask >> i & 1 ? std::fma(x.of[i], y.of[i], z.of[i]) : z.of[i];
    });
}
inline __mmask16 mask_cmp_ps_mask(__mmask16 mask, __m512 a, __m512 b, int how) {
    const Floats x = Floats::in(a), y = Floats::in(b);
    unsigned found = 0;
    for (int i = 0; i < 16; ++i)
        found |= (how == _CMP_GT_OQ ? x.of[i] > y.of[i] : x.of[i] < y.of[i]) << i;
    return static_cast<__mmask16>(found & mask);
}
inline __mmask16 cmp_ps_mask(__m512 a, __m512 b, int how) {
    return mask_cmp_ps_mask(0xffff, a, b, how);
}
inline __m512 maskz_mov_ps(__mmask16 mask, __m512 a) {
    const Floats x = Floats::in(a);
    return floats([=](int i) { return mask >> i & 1 ? x.of[i] : 0.0f; });
}

inline __m512i add_epi32(__m512i a, __m512i b) {
    const Ints x = Ints::in(a), y = Ints::in(b);
    return ints([=](int i) { return x.of[i] + y.of[i]; });
}
inline __m512i cvtepu8_epi32(__m128i a) {
    const auto x = Sixteen<uint8_t>::in(a);
    return ints([=](int i) { return x.of[i]; });
}
inline __m512i cvtepu16_epi32(__m256i a) {
    const auto x = Sixteen<uint16_t>::in(a);
    return ints([=](int i) { return x.of[i]; });
}
inline __m128i cvtepi32_epi8(__m512i a) {
    const Ints x = Ints::in(a);
    return as<__m128i>(Sixteen<uint8_t>::made([=](int i) { return x.of[i]; }));
}
inline __m256i cvtepi32_epi16(__m512i a) {
    const Ints x = Ints::in(a);
    return as<__m256i>(Sixteen<uint16_t>::made([=](int i) { return x.of[i]; }));
}

inline void storeu_ps(void* to, __m512 a) { std::memcpy(to, &a, sizeof a); }
inline __m512 permutexvar_ps(__m512i index, __m512 a) {
    const Ints at = Ints::in(index);
    const Floats x = Floats::in(a);
    return floats([=](int i) { return x.of[at.of[i] & 15]; });
}
inline __m512 permutex2var_ps(__m512 a, __m512i index, __m512 b) {
    const Ints at = Ints::in(index);
    const Floats x = Floats::in(a), y = Floats::in(b);
    return floats([=](int i) { return (at.of[i] & 16 ? y : x).of[at.of[i] & 15]; });
}
inline __m512 i32gather_ps(__m512i index, const float* table, int) {
    const Ints at = Ints::in(index);
    return floats([=](int i) { return table[at.of[i]]; });
}

}  // namespace by_value

#undef _mm512_roundscale_ps
#undef _mm512_cmp_ps_mask
#undef _mm512_mask_cmp_ps_mask
#undef _mm512_i32gather_ps
#define _mm512_set1_ps by_value::set1_ps
#define _mm512_set1_epi32 by_value::set1_epi32
#define _mm512_setr_epi32 by_value::setr_epi32
#define _mm512_max_ps by_value::max_ps
#define _mm512_min_ps by_value::min_ps
#define _mm512_mul_ps by_value::mul_ps
#define _mm512_abs_ps by_value::abs_ps
#define _mm512_roundscale_ps by_value::roundscale_ps
#define _mm512_fnmadd_ps by_value::fnmadd_ps
#define _mm512_mask3_fmadd_ps by_value::mask3_fmadd_ps
#define _mm512_cmp_ps_mask by_value::cmp_ps_mask
#define _mm512_mask_cmp_ps_mask by_value::mask_cmp_ps_mask
#define _mm512_maskz_mov_ps by_value::maskz_mov_ps
#define _mm512_add_epi32 by_value::add_epi32
#define _mm512_cvtepu8_epi32 by_value::cvtepu8_epi32
#define _mm512_cvtepu16_epi32 by_value::cvtepu16_epi32
#define _mm512_cvtepi32_epi8 by_value::cvtepi32_epi8
#define _mm512_cvtepi32_epi16 by_value::cvtepi32_epi16
#define _mm512_storeu_ps by_value::storeu_ps
#define _mm512_permutexvar_ps by_value::permutexvar_ps
#define _mm512_permutex2var_ps by_value::permutex2var_ps
#define _mm512_i32gather_ps by_value::i32gather_ps
#define __AVX512F__ 1
