// What the C++ passes share: the types of the values, and when threads pay; see `native.py`.

#pragma once

#include <cstdint>
#include <cstring>

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

inline void store(bfloat16* to, long i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t to_nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to[i].bits = static_cast<uint16_t>(value != value ? 0x7fc0u : to_nearest_even);
}

// Run `use` with a value of the tensor's type.
template <class Use>
void typed(long is_half, const Use use) {
    if (is_half)
        use(bfloat16{});
    else
        use(float{});
}

}  // namespace
