// What the C++ passes share: the types of the values, and when threads pay; see `native.py`.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace {

// With fewer values a second thread costs more than it brings.
constexpr long VALUES_WORTH_THREADS = 32768;

struct bfloat16 {
    uint16_t bits;
};

inline float load(const float* from, long i) { return from[i]; }
inline void store(float* to, long i, float value) { to[i] = value; }

inline float load(const bfloat16* from, long i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Bits of the nearest bfloat16, ties to even, in the upper half.
inline uint32_t rounded_bits(float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : nearest;
}

inline void store(bfloat16* to, long i, float value) {
    to[i].bits = static_cast<uint16_t>(rounded_bits(value) >> 16);
}

// What is read after `store` wrote it.
inline float as_stored(float value, const float*) { return value; }

inline float as_stored(float value, const bfloat16*) {
    return __builtin_bit_cast(float, rounded_bits(value));
}

// Run `use` with a value of the tensor's type.
template <class Use>
void typed(long is_half, const Use use) {
    if (is_half)
        use(bfloat16{});
    else
        use(float{});
}

// An argument as `native_function.cpp` passes it.
union Word {
    void* place;
    int64_t number;
    float figure;
};

template <class Argument>
Argument read(const Word& word) {
    if constexpr (std::is_pointer_v<Argument>)
        return static_cast<Argument>(word.place);
    else if constexpr (std::is_floating_point_v<Argument>)
        return word.figure;
    else
        return word.number;
}

template <class... Arguments, size_t... Is>
void call_with(void (*function)(Arguments...), const Word* words, std::index_sequence<Is...>) {
    function(read<Arguments>(words[Is])...);
}

template <class... Arguments>
void call_with(void (*function)(Arguments...), const Word* words) {
    call_with(function, words, std::index_sequence_for<Arguments...>{});
}

}  // namespace

// Lets a graph of torch call the function.
#define CALLED_BY_GRAPH(function) \
    extern "C" void function##_by_words(const Word* words) { call_with(function, words); }
