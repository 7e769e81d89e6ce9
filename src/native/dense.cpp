// y = x Wᵀ for a few rows of x and a weight of 16-bit floating point numbers that is larger than the caches,
// such as a language model's head: one pass over the weight, sums in float32.
#include "common.hpp"
#include "halves.hpp"

#include <algorithm>

namespace roundwise {
namespace {

constexpr int PAIRS = 2; // vectors of sums per row, so that additions need not wait for each other
constexpr int MOST = 2;  // rows of x, at most

// Widens a vector of 16-bit numbers to two vectors of float32: the lower and the upper of each pair.
template <Type type>
inline void widen(const std::uint16_t *from, Vec &lower, Vec &upper) {
    const Bits both = load<Bits>(from);
    if constexpr (type == Type::bfloat16) {
        lower = (Vec)(both << 16);
        upper = (Vec)(both & 0xffff0000u);
    } else {
        lower = vector_of_half(both & 0xffffu);
        upper = vector_of_half(both >> 16);
    }
}

// x as float32, in the order of `widen`: [rows][vector][lower, upper].
template <Type type>
void spread(const Dense &p, float *x) {
    for (Index r = 0; r < p.rows; ++r) {
        const auto *from = static_cast<const std::uint16_t *>(p.x) + r * p.in;
        for (Index k = 0; k < p.in; ++k) {
            const Index place = k / (2 * LANES) * 2 * LANES + k % 2 * LANES + k % (2 * LANES) / 2;
            x[r * p.in + place] = to_float(from[k], type);
        }
    }
}

template <Type type, int rows>
void outputs(const Dense &p, const float *x, Index first, Index last) {
    for (Index o = first; o < last; ++o) {
        const std::uint16_t *w = static_cast<const std::uint16_t *>(p.W) + o * p.in;
        Vec sums[rows][PAIRS] = {};
        for (Index k = 0; k < p.in; k += 2 * LANES) {
            Vec lower, upper;
            widen<type>(w + k, lower, upper);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                sums[r][0] += load<Vec>(x + r * p.in + k) * lower;
                sums[r][1] += load<Vec>(x + r * p.in + k + LANES) * upper;
            }
        }
        for (int r = 0; r < rows; ++r) {
            const Vec all = sums[r][0] + sums[r][1];
            float sum = 0;
            for (int i = 0; i < LANES; ++i) sum += all[i];
            static_cast<std::uint16_t *>(p.y)[r * p.out + o] = from_float(sum, type);
        }
    }
}

template <Type type>
void dense(const Dense &p, int threads) {
    Scratch<float> x(p.rows * p.in);
    spread<type>(p, x.get());
    const Index jobs = least(p.out, 8 * threads);
    in_parallel(jobs, threads, [&](Parts &parts) {
        for (Index job; (job = parts.next()) >= 0;) {
            const Index first = job * p.out / jobs, last = (job + 1) * p.out / jobs;
            switch (p.rows) {
                case 1: outputs<type, 1>(p, x.get(), first, last); break;
                default: outputs<type, MOST>(p, x.get(), first, last);
            }
        }
    });
}

} // namespace

#define ROUNDWISE_JOIN(a, b) a##b
#define ROUNDWISE_CALL(a, b) ROUNDWISE_JOIN(a, b)
void ROUNDWISE_CALL(dense_, ROUNDWISE_ISA)(const Dense &p, int threads) {
    if (p.type == Type::bfloat16) return dense<Type::bfloat16>(p, threads);
    dense<Type::float16>(p, threads);
}

} // namespace roundwise
