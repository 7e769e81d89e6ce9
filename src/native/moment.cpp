// C += Aᵀ B for tall A [tokens, m] and B [tokens, n]: the sums that Hessians and drifts are made of. With
// `lower`, A is B and only the blocks of C on and below the diagonal are computed. Products of bfloat16
// pairs are exact and summed up in float32 by one instruction where the machine has it.
//
// Blocks of C of ROWS x COLUMNS vectors stay in registers while DEPTH tokens pass; the tokens are copied
// into strips first, so that the inner loop reads memory in order.
#include "common.hpp"

#include <cstring>

#ifdef ROUNDWISE_BF16
#include <immintrin.h>
#endif

namespace roundwise {
namespace {

constexpr int LANES = ROUNDWISE_VECTOR / 4;
typedef float Vec __attribute__((vector_size(ROUNDWISE_VECTOR)));

// A block of C in registers: ROWS x (COLUMNS vectors).
constexpr int ROWS = ROUNDWISE_VECTOR == 64 ? 12 : 6;
constexpr int COLUMNS = 2;
constexpr int WIDE = COLUMNS * LANES;
constexpr Index DEPTH = 256; // tokens that pass through a block at a time
constexpr Index COPIED = 16 << 20; // bytes of tokens in strips at a time
constexpr Index TILE_A = 16, TILE_B = 4; // strips of a job

// How tokens are laid out in a strip of `width` columns. One float32 per token and column, or, for
// bfloat16, two tokens beside each other.
struct Float32 {
    typedef float Input;
    typedef float Unit;
    static constexpr Index tokens = 1;
    static void copy(const Input *x, Index ld, Index depth, int width, int padded, Unit *strip) {
        for (Index t = 0; t < depth; ++t) {
            for (int c = 0; c < width; ++c) strip[t * padded + c] = x[t * ld + c];
            for (int c = width; c < padded; ++c) strip[t * padded + c] = 0;
        }
    }
    static Vec product(Unit a, const Unit *b, Vec sum) {
        Vec v;
        std::memcpy(&v, b, sizeof v);
        return sum + a * v;
    }
};

#ifdef ROUNDWISE_BF16
struct BFloat16 {
    typedef std::uint16_t Input;
    typedef std::uint32_t Unit;
    static constexpr Index tokens = 2;
    static void copy(const Input *x, Index ld, Index depth, int width, int padded, Unit *strip) {
        for (Index t = 0; t < depth; t += 2) {
            const Input *first = x + t * ld, *second = first + ld;
            const bool both = t + 1 < depth;
            Unit *to = strip + t / 2 * padded;
            for (int c = 0; c < width; ++c)
                to[c] = first[c] | (both ? Unit{second[c]} << 16 : 0);
            for (int c = width; c < padded; ++c) to[c] = 0;
        }
    }
    static Vec product(Unit a, const Unit *b, Vec sum) {
        const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a));
        const __m512bh right = (__m512bh)_mm512_loadu_si512(b);
        return (Vec)_mm512_dpbf16_ps((__m512)sum, left, right);
    }
};
#endif

// A block of C: `units` steps over a strip of A (ROWS wide) and one of B (WIDE wide).
template <class Type>
inline void block(Index units, const typename Type::Unit *a, const typename Type::Unit *b, float *C,
                  Index ld, int rows, int columns) {
    Vec sum[ROWS][COLUMNS] = {};
    for (Index t = 0; t < units; ++t) {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
            for (int c = 0; c < COLUMNS; ++c)
                sum[r][c] = Type::product(a[t * ROWS + r], b + t * WIDE + c * LANES, sum[r][c]);
    }
    for (int r = 0; r < rows; ++r) {
        float line[WIDE];
        std::memcpy(line, sum[r], sizeof line);
        for (int c = 0; c < columns; ++c) C[r * ld + c] += line[c];
    }
}

template <class Type>
void moment(const Moment &p, int threads) {
    typedef typename Type::Unit Unit;
    const auto *A = static_cast<const typename Type::Input *>(p.A);
    const auto *B = static_cast<const typename Type::Input *>(p.B);
    const Index strips_a = (p.m + ROWS - 1) / ROWS, strips_b = (p.n + WIDE - 1) / WIDE;
    const Index strips = strips_a + strips_b;
    const Index width = strips_a * ROWS + strips_b * WIDE;
    // Tokens copied at a time: whole depths, and few enough for their copy to stay small.
    const Index fit = COPIED / Index(sizeof(Unit)) * Type::tokens / (width * DEPTH);
    const Index stretch = least(fit > 1 ? fit * DEPTH : DEPTH, (p.tokens + DEPTH - 1) / DEPTH * DEPTH);
    Scratch<Unit> memory(width * (stretch / Type::tokens));
    for (Index token = 0; token < p.tokens; token += stretch) {
        const Index tokens = least(stretch, p.tokens - token);
        const Index units = (tokens + Type::tokens - 1) / Type::tokens;
        Unit *a = memory.get(), *b = a + strips_a * ROWS * units;
        in_parallel(strips, threads, [&](Parts &parts) {
            for (Index strip; (strip = parts.next()) >= 0;) {
                if (strip < strips_a) {
                    const Index column = strip * ROWS;
                    Type::copy(A + token * p.ld_A + column, p.ld_A, tokens,
                               static_cast<int>(least(ROWS, p.m - column)), ROWS, a + column * units);
                } else {
                    const Index column = (strip - strips_a) * WIDE;
                    Type::copy(B + token * p.ld_B + column, p.ld_B, tokens,
                               static_cast<int>(least(WIDE, p.n - column)), WIDE, b + column * units);
                }
            }
        });
        const Index tiles_a = (strips_a + TILE_A - 1) / TILE_A, tiles_b = (strips_b + TILE_B - 1) / TILE_B;
        in_parallel(tiles_a * tiles_b, threads, [&](Parts &parts) {
            for (Index job; (job = parts.next()) >= 0;) {
                const Index first_a = job / tiles_b * TILE_A, first_b = job % tiles_b * TILE_B;
                const Index last_a = least(first_a + TILE_A, strips_a), last_b = least(first_b + TILE_B, strips_b);
                if (p.lower && last_a * ROWS <= first_b * WIDE) continue;
                for (Index unit = 0; unit < units; unit += DEPTH / Type::tokens) {
                    const Index depth = least(DEPTH / Type::tokens, units - unit);
                    for (Index sb = first_b; sb < last_b; ++sb) {
                        for (Index sa = first_a; sa < last_a; ++sa) {
                            const Index i = sa * ROWS, j = sb * WIDE;
                            if (p.lower && i + ROWS <= j) continue;
                            block<Type>(depth, a + i * units + unit * ROWS, b + j * units + unit * WIDE,
                                        p.C + i * p.ld_C + j, p.ld_C, static_cast<int>(least(ROWS, p.m - i)),
                                        static_cast<int>(least(WIDE, p.n - j)));
                        }
                    }
                }
            }
        });
    }
}

} // namespace

#define ROUNDWISE_JOIN(a, b) a##b
#define ROUNDWISE_CALL(a, b) ROUNDWISE_JOIN(a, b)
void ROUNDWISE_CALL(moment_f32_, ROUNDWISE_ISA)(const Moment &p, int threads) {
    moment<Float32>(p, threads);
}
#ifdef ROUNDWISE_BF16
void ROUNDWISE_CALL(moment_bf16_, ROUNDWISE_ISA)(const Moment &p, int threads) {
    moment<BFloat16>(p, threads);
}
#endif

} // namespace roundwise
