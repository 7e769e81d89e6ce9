// Vectors of one instruction set's width, and conversion of 16-bit floating point numbers to and from float32.
#pragma once
#include "common.hpp"

#include <cstring>

#ifdef ROUNDWISE_X86
#include <immintrin.h>
#endif

namespace roundwise {
namespace {

constexpr int LANES = ROUNDWISE_VECTOR / 4;
typedef std::int32_t Int __attribute__((vector_size(ROUNDWISE_VECTOR)));
typedef std::uint32_t Bits __attribute__((vector_size(ROUNDWISE_VECTOR)));
typedef float Vec __attribute__((vector_size(ROUNDWISE_VECTOR)));

template <class V>
inline V load(const void *from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <class V>
inline void store(void *to, V v) {
    std::memcpy(to, &v, sizeof v);
}

// Finite float16, one in each lane.
inline Vec vector_of_half(Bits half) {
#if defined(ROUNDWISE_X86) && ROUNDWISE_VECTOR == 64
    return (Vec)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)half));
#else
    const Vec size = (Vec)((half & 0x7fffu) << 13) * 0x1p112f;
    return (Vec)((Bits)size | (half & 0x8000u) << 16);
#endif
}

// Finite float16, one after another.
inline Vec vector_of_half(const std::uint16_t *from) {
#if defined(ROUNDWISE_X86) && ROUNDWISE_VECTOR == 64
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
#elif defined(ROUNDWISE_X86) && ROUNDWISE_VECTOR == 32
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#else
    Bits half;
    for (int i = 0; i < LANES; ++i) half[i] = from[i];
    return vector_of_half(half);
#endif
}

inline float to_float(std::uint16_t x, Type type) {
    const std::uint32_t bits = x, high = bits << 16;
    if (type == Type::bfloat16) return load<float>(&high);
    const std::uint32_t shifted = (bits & 0x7fffu) << 13;
    const float size = load<float>(&shifted) * 0x1p112f;
    std::uint32_t out = load<std::uint32_t>(&size) | (bits & 0x8000u) << 16;
    if ((bits & 0x7c00u) == 0x7c00u) out |= 0x7f800000u; // infinite, or not a number
    return load<float>(&out);
}

inline std::uint16_t from_float(float x, Type type) {
    const std::uint32_t bits = load<std::uint32_t>(&x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    // Without branches, so that compilers vectorize it.
    if (type == Type::bfloat16) {
        const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        return static_cast<std::uint16_t>(size > 0x7f800000u ? sign | 0x7fc0u : rounded);
    }
    const float padded = load<float>(&size) + 0.5f; // the addition rounds numbers that become subnormal
    const std::uint32_t small = load<std::uint32_t>(&padded) - 0x3f000000u;
    const std::uint32_t normal = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
    const std::uint32_t finite = size < 0x38800000u ? small : normal;
    const std::uint32_t large = size > 0x7f800000u ? 0x7e00u : 0x7c00u; // from 65520 on: infinite
    return static_cast<std::uint16_t>(sign | (size >= 0x477ff000u ? large : finite));
}

} // namespace
} // namespace roundwise
