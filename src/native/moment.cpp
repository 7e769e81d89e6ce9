// C += Aᵀ B for tall A [tokens, m] and B [tokens, n]: the sums behind Hessians and drifts. With
// `lower`, A is B and only the blocks of C on and below the diagonal are computed. Products of bfloat16
// pairs are exact and summed up in float32 by one instruction where the machine has it.
//
// Blocks of C of ROWS x COLUMNS vectors stay in registers while DEPTH tokens pass; the tokens are copied
// into strips first, so that the inner loop reads memory in order: strips of B once for all jobs, strips of
// A by each job, into its own cache.
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
constexpr Index COPIED = 16 << 20; // bytes of B in strips at a time
constexpr Index TILE_A = 16, TILE_B = 16, LEAST_A = 2; // strips of a job; fewer where there are few jobs

// Input of the inner loop, a unit for each step and column: a float32, or the bfloat16 of two tokens side by
// side. `pack` copies `depth` tokens of some columns into strips that are W columns wide.
struct Float32 {
    typedef float Input;
    typedef float Unit;
    static constexpr Index tokens = 1;
    template <int W>
    static void pack(const Input *x, Index ld, Index depth, Index columns, Unit *to) {
        for (Index t = 0; t < depth; ++t) {
            const Input *from = x + t * ld;
            Unit *unit = to + t * W;
            Index c = 0;
            for (; c + W <= columns; c += W) std::memcpy(unit + c * depth, from + c, W * sizeof(Unit));
            for (int rest = 0; c < columns && rest < W; ++rest)
                unit[c * depth + rest] = c + rest < columns ? from[c + rest] : 0;
        }
    }
    // The same for the transpose: x is [columns, tokens].
    template <int W>
    static void pack_turned(const Input *x, Index ld, Index depth, Index columns, Unit *to) {
        for (Index c = 0; c < columns; c += W)
            for (Index t = 0; t < depth; ++t)
                for (int rest = 0; rest < W; ++rest)
                    to[c * depth + t * W + rest] = c + rest < columns ? x[(c + rest) * ld + t] : 0;
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
    template <int W>
    static void pack(const Input *x, Index ld, Index depth, Index columns, Unit *to) {
        const Index units = (depth + 1) / 2;
        for (Index t = 0; t < depth; t += 2) {
            const Input *first = x + t * ld, *second = first + ld;
            const bool both = t + 1 < depth;
            for (Index c = 0; c < columns; c += W) {
                Unit *unit = to + c * units + t / 2 * W;
                const int width = static_cast<int>(least(W, columns - c));
                for (int k = 0; k < width; ++k)
                    unit[k] = first[c + k] | (both ? Unit{second[c + k]} << 16 : 0);
                for (int k = width; k < W; ++k) unit[k] = 0;
            }
        }
    }
    template <int W>
    static void pack_turned(const Input *, Index, Index, Index, Unit *) {} // never called
    static Vec product(Unit a, const Unit *b, Vec sum) {
        const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a));
        const __m512bh right = (__m512bh)_mm512_loadu_si512(b);
        return (Vec)_mm512_dpbf16_ps((__m512)sum, left, right);
    }
};
#endif

// A block of C: `units` steps over a strip of A (ROWS wide) and one of B (WIDE wide).
template <class Type>
inline void block(Index units, const typename Type::Unit *a, const typename Type::Unit *b, float scale,
                  float *C, Index ld, int rows, int columns) {
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
        for (int c = 0; c < columns; ++c) C[r * ld + c] += scale * line[c];
    }
}

// Some rows of C (`strips` of A) and some columns (strips of B, of which `b` has `units`) over all tokens.
template <class Type>
void tile(const Moment &p, Index token, Index units, Index first_a, Index strips, Index first_b,
          const typename Type::Unit *b, typename Type::Unit *a) {
    constexpr Index step = DEPTH / Type::tokens;
    const auto *A = static_cast<const typename Type::Input *>(p.A);
    const Index row = first_a * ROWS, rows = least(strips * ROWS, p.m - row);
    const Index end = least((first_b + TILE_B) * WIDE, p.n);
    for (Index unit = 0; unit < units; unit += step) {
        const Index depth = least(step, units - unit), t = token + unit * Type::tokens;
        const Index tokens = least(DEPTH, p.tokens - t);
        if (p.turned)
            Type::template pack_turned<ROWS>(A + row * p.ld_A + t, p.ld_A, tokens, rows, a);
        else
            Type::template pack<ROWS>(A + t * p.ld_A + row, p.ld_A, tokens, rows, a);
        for (Index j = first_b * WIDE; j < end; j += WIDE) {
            for (Index i = 0; i < rows; i += ROWS) {
                if (p.lower && row + i + ROWS <= j) continue;
                block<Type>(depth, a + i * depth, b + j * units + unit * WIDE, p.scale, p.C + (row + i) * p.ld_C + j, p.ld_C,
                            static_cast<int>(least(ROWS, rows - i)), static_cast<int>(least(WIDE, p.n - j)));
            }
        }
    }
}

template <class Type>
void moment(const Moment &p, int threads) {
    typedef typename Type::Unit Unit;
    const auto *B = static_cast<const typename Type::Input *>(p.B);
    const Index strips_a = (p.m + ROWS - 1) / ROWS, strips_b = (p.n + WIDE - 1) / WIDE;
    const Index tiles_b = (strips_b + TILE_B - 1) / TILE_B;
    Index each = TILE_A;
    while (each > LEAST_A && (strips_a + each - 1) / each * tiles_b < 4 * threads) each /= 2;
    const Index tiles_a = (strips_a + each - 1) / each;
    // Tokens copied at a time: a multiple of the depth, and few enough for a small copy.
    const Index fit = COPIED / Index(sizeof(Unit)) * Type::tokens / (strips_b * WIDE * DEPTH);
    const Index stretch = least(fit > 1 ? fit * DEPTH : DEPTH, (p.tokens + DEPTH - 1) / DEPTH * DEPTH);
    Scratch<Unit> copy(strips_b * WIDE * (stretch / Type::tokens));
    for (Index token = 0; token < p.tokens; token += stretch) {
        const Index tokens = least(stretch, p.tokens - token);
        const Index units = (tokens + Type::tokens - 1) / Type::tokens;
        in_parallel(strips_b, threads, [&](Parts &parts) {
            for (Index strip; (strip = parts.next()) >= 0;) {
                const Index column = strip * WIDE;
                Type::template pack<WIDE>(B + token * p.ld_B + column, p.ld_B, tokens, least(WIDE, p.n - column),
                                          copy.get() + column * units);
            }
        });
        in_parallel(tiles_a * tiles_b, threads, [&](Parts &parts) {
            Scratch<Unit> mine(each * ROWS * DEPTH / Type::tokens);
            for (Index job; (job = parts.next()) >= 0;) {
                const Index first_a = job / tiles_b * each, first_b = job % tiles_b * TILE_B;
                if (p.lower && (first_a + each) * ROWS <= first_b * WIDE) continue;
                tile<Type>(p, token, units, first_a, each, first_b, copy.get(), mine.get());
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
