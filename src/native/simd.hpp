// Vectors of the instruction set that a file is compiled for: ROUNDWISE_VECTOR bytes each. Internal linkage,
// for the reason given in common.hpp.
#pragma once
#include "common.hpp"

#include <cstring>

namespace roundwise {
namespace {

template <class T>
struct Simd;
template <>
struct Simd<float> {
    typedef float Vec __attribute__((vector_size(ROUNDWISE_VECTOR)));
    typedef std::int32_t Int __attribute__((vector_size(ROUNDWISE_VECTOR)));
    static constexpr int lanes = ROUNDWISE_VECTOR / 4;
    static constexpr float round = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    static constexpr std::int32_t exponent = 0x7f800000;
    static constexpr float half = 12288.0f; // 1.5 * 2^13: see `storable`
};
template <>
struct Simd<double> {
    typedef double Vec __attribute__((vector_size(ROUNDWISE_VECTOR)));
    typedef std::int64_t Int __attribute__((vector_size(ROUNDWISE_VECTOR)));
    static constexpr int lanes = ROUNDWISE_VECTOR / 8;
    static constexpr double round = 6755399441055744.0; // 1.5 * 2^52
    static constexpr std::int64_t exponent = 0x7ff0000000000000;
    static constexpr double half = 6597069766656.0; // 1.5 * 2^42
};
template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
inline Vec<T> splat(T x) {
    return Vec<T>{} + x;
}
template <class V>
inline V smaller(V a, V b) {
    return a < b ? a : b;
}
template <class V>
inline V larger(V a, V b) {
    return a > b ? a : b;
}

// `count` entries into the first lanes, zeros into the others.
template <class T>
inline Vec<T> load(const T *from, int count) {
    Vec<T> v{};
    if (count == Simd<T>::lanes) {
        std::memcpy(&v, from, sizeof v);
    } else {
        std::memcpy(&v, from, sizeof(T) * static_cast<std::size_t>(count));
    }
    return v;
}
template <class T>
inline void store(T *to, Vec<T> v, int count) {
    if (count == Simd<T>::lanes) {
        std::memcpy(to, &v, sizeof v);
    } else {
        std::memcpy(to, &v, sizeof(T) * static_cast<std::size_t>(count));
    }
}
template <class T>
inline Vec<T> load_codes(const std::uint8_t *from, int count) {
    Vec<T> v{};
    for (int lane = 0; lane < count; ++lane) v[lane] = static_cast<T>(from[lane]);
    return v;
}
template <class T>
inline void store_codes(std::uint8_t *to, Vec<T> v, int count) {
    typename Simd<T>::Int codes = __builtin_convertvector(v, typename Simd<T>::Int);
    for (int lane = 0; lane < count; ++lane) to[lane] = static_cast<std::uint8_t>(codes[lane]);
}

// Half to even, for |x| < 2^22. The compiler must not reassociate (no -ffast-math).
template <class T>
inline Vec<T> rounded(Vec<T> x) {
    return (x + Simd<T>::round) - Simd<T>::round;
}

// code - zero of the nearest grid point; `low` and `high` are -zero and maxq - zero.
template <class T>
inline Vec<T> nearest(Vec<T> ratio, Vec<T> low, Vec<T> high) {
    // In this order a NaN becomes `low`: never a code outside the range.
    return rounded<T>(smaller(larger(ratio, low), high));
}

} // namespace
} // namespace roundwise
