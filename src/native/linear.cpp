// y = x Wᵀ from packed weights. Activations are rounded to 16-bit integers, with a scale for each run of up
// to 128 in a group; products with the codes are summed exactly, in 32-bit integers, and scaled once a run:
//
//     y[o] += scale[o] · s · (Σ code[o, k] q[k] - zero[o] Σ q[k])        x[k] ≈ s · q[k], |q| ≤ 32767
//
// The result is as accurate as in float32, at the speed of 16-bit products: one instruction multiplies and
// adds pairs. A row's result depends neither on the other rows nor on the number of threads.
//
// Codes lie in tiles of 64 output channels, [tile][word][64], so that a thread reads memory in one stream.
// A 32-bit word holds neighbours k of one channel; codes bits·p and bits·p + 16 of it make pair p.
#include "common.hpp"
#include "halves.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace roundwise {
namespace {

constexpr int TILE = 64;                                // output channels
constexpr int VECTORS = TILE / LANES;                   // of a tile
constexpr int BESIDE = ROUNDWISE_VECTOR == 64 ? 4 : 2;  // vectors in registers at a time
constexpr int ROWS = 6;                                 // rows of activations in registers at a time
constexpr Index STRETCH = 960;                          // rows rounded to integers at a time
constexpr Index CHUNK = 192;                            // rows of a job: their sums stay in the cache
constexpr Index AHEAD = 1024;                           // words prefetched in advance
constexpr int RUN = 128;                                // columns of a run, at most

// sum + a·b over the pairs of 16-bit integers in each lane.
inline Int dot(Int sum, Int a, Int b) {
#if defined(ROUNDWISE_VNNI)
    return (Int)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(ROUNDWISE_X86) && ROUNDWISE_VECTOR == 64
    return sum + (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(ROUNDWISE_X86) && ROUNDWISE_VECTOR == 32
    return sum + (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(ROUNDWISE_X86)
    return sum + (Int)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Activations 2p and 2p + 1 in every lane.
inline Int both(const std::int16_t *q, Index p) { return load<std::int32_t>(q + 2 * p) - Int{}; }

// Layout of `bits`-wide codes in words. Two codes 16 bits apart in a word are a pair. A pair is numbered by
// its byte in each half of the word (h) and its place in that byte (l), `bits`·l above the lowest bit.
template <int bits>
struct Width {
    static constexpr int field = bits == 3 ? 2 : bits;         // bits of a code in its word
    static constexpr int words = bits == 3 ? 3 : 1;            // of a unit
    static constexpr int bytes = bits == 3 ? 4 : 2;            // of a unit's halves
    static constexpr int levels = 8 / field;                   // codes of a byte
    static constexpr int pairs = bytes * levels;               // of a unit
    // A byte of each half of each lane, lowest. Three bits: words of 16 times two low bits, and the third
    // bits of all 32 in a word, from which `high` moves those of a byte to bits 2, 4, 6, 8.
    static Bits byte(const Bits *word, int h) { return h % 2 ? word[h / 2] >> 8 : word[h / 2]; }
    static Bits high(const Bits *word, int h) { return h < 2 ? word[2] << (2 - h) : word[2] >> (4 + h); }
    // Pair l of byte h, times 2^(field·l).
    static Int pair(Bits byte, Bits high, int l) {
        const Bits low = byte & (((1u << field) - 1) * 0x00010001u << (field * l));
        return (Int)(bits == 3 ? low | (high & 0x00040004u << (field * l)) : low);
    }
};

// Adds a run to the sums of a tile: one vector of output channels at `v`.
struct Scaling {
    const std::uint8_t *scales; // of the tile and group
    const std::uint8_t *zeros;  // likewise; null: all are `zero`
    bool half;
    float zero;

    Vec scale(int v) const {
        if (half) return vector_of_half(reinterpret_cast<const std::uint16_t *>(scales) + v * LANES);
        return load<Vec>(reinterpret_cast<const float *>(scales) + v * LANES);
    }
    Vec offset(int v) const {
        if (zeros == nullptr) return zero - Vec{};
        Int z;
        for (int i = 0; i < LANES; ++i) z[i] = zeros[v * LANES + i];
        return __builtin_convertvector(z, Vec);
    }
};

inline void add(float *sums, Vec scale, Vec offset, Int dots, float step, float total) {
    const Vec value = __builtin_convertvector(dots, Vec) * step - offset * total;
    store(sums, load<Vec>(sums) + scale * value);
}

// One run of one row, computed from the words directly.
template <int bits>
inline void run_of_row(const std::uint32_t *codes, const std::int16_t *q, int units, const Scaling &scaling,
                       float step, float total, float *sums) {
    typedef Width<bits> W;
    for (int v = 0; v < VECTORS; v += BESIDE) {
        Int dots[BESIDE][W::levels] = {}; // by place: times 2^(field·l)
        for (int u = 0; u < units; ++u) {
            Bits word[BESIDE][W::words];
            for (int s = 0; s < BESIDE; ++s)
                for (int w = 0; w < W::words; ++w) {
                    const std::uint32_t *from = codes + (u * W::words + w) * TILE + (v + s) * LANES;
                    if ((v + s) * LANES % 16 == 0) __builtin_prefetch(from + AHEAD);
                    word[s][w] = load<Bits>(from);
                }
#pragma GCC unroll 4
            for (int h = 0; h < W::bytes; ++h) {
                Int x[W::levels];
                for (int l = 0; l < W::levels; ++l) x[l] = both(q, u * W::pairs + h * W::levels + l);
#pragma GCC unroll 4
                for (int s = 0; s < BESIDE; ++s) {
                    const Bits byte = W::byte(word[s], h), high = bits == 3 ? W::high(word[s], h) : byte;
#pragma GCC unroll 4
                    for (int l = 0; l < W::levels; ++l) dots[s][l] = dot(dots[s][l], W::pair(byte, high, l), x[l]);
                }
            }
        }
#pragma GCC unroll 4
        for (int s = 0; s < BESIDE; ++s) {
            Int sum = dots[s][0];
            for (int l = 1; l < W::levels; ++l) sum += dots[s][l] >> (W::field * l);
            add(sums + (v + s) * LANES, scaling.scale(v + s), scaling.offset(v + s), sum, step, total);
        }
    }
}

// The pairs of a run and tile: [pair][TILE].
template <int bits>
inline void unpack(const std::uint32_t *codes, int units, std::int32_t *pairs) {
    typedef Width<bits> W;
    for (int u = 0; u < units; ++u) {
        for (int v = 0; v < VECTORS; ++v) {
            Bits word[W::words];
            for (int w = 0; w < W::words; ++w) word[w] = load<Bits>(codes + (u * W::words + w) * TILE + v * LANES);
#pragma GCC unroll 4
            for (int h = 0; h < W::bytes; ++h) {
                const Bits byte = W::byte(word, h), high = bits == 3 ? W::high(word, h) : byte;
#pragma GCC unroll 4
                for (int l = 0; l < W::levels; ++l)
                    store(pairs + (u * W::pairs + h * W::levels + l) * TILE + v * LANES,
                          W::pair(byte, high, l) >> (W::field * l));
            }
        }
    }
}

// One run of `rows` rows, computed from unpacked pairs.
template <int rows>
inline void run_of_rows(const std::int32_t *pairs, const std::int16_t *q, int count, const Scaling &scaling,
                        const float *step, const float *total, float *sums) {
    for (int v = 0; v < VECTORS; v += BESIDE) {
        Int dots[rows][BESIDE] = {};
        for (int p = 0; p < count; ++p) {
            Int code[BESIDE];
#pragma GCC unroll 4
            for (int s = 0; s < BESIDE; ++s) code[s] = load<Int>(pairs + p * TILE + (v + s) * LANES);
#pragma GCC unroll 6
            for (int r = 0; r < rows; ++r) {
                const Int x = both(q, r * count + p);
#pragma GCC unroll 4
                for (int s = 0; s < BESIDE; ++s) dots[r][s] = dot(dots[r][s], code[s], x);
            }
        }
#pragma GCC unroll 4
        for (int s = 0; s < BESIDE; ++s) {
            const Vec scale = scaling.scale(v + s), offset = scaling.offset(v + s);
#pragma GCC unroll 6
            for (int r = 0; r < rows; ++r)
                add(sums + r * TILE + (v + s) * LANES, scale, offset, dots[r][s], step[r], total[r]);
        }
    }
}

// The activations of some rows as integers: q [run][row][column], step and total [run][row].
struct Integers {
    std::int16_t *q;
    float *step, *total;
    Index rows;
};

// One row: x in its own order and type; `line` has room for it in float32, and for a zero at its end.
inline void make_integers(const Linear &p, Index row, const Integers &to, Index place, float *line) {
    if (p.type == Type::float32) {
        std::memcpy(line, static_cast<const float *>(p.x) + row * p.in, static_cast<std::size_t>(p.in) * 4);
    } else {
        const auto *x = static_cast<const std::uint16_t *>(p.x) + row * p.in;
        if (p.type == Type::bfloat16) {
            for (Index k = 0; k < p.in; ++k) line[k] = to_float(x[k], Type::bfloat16);
        } else {
            for (Index k = 0; k < p.in; ++k) line[k] = to_float(x[k], Type::float16);
        }
    }
    line[p.in] = 0; // read by padding columns
    Index column = 0;
    for (Index run = 0; run < p.runs; ++run) {
        const Index n = p.run[2 * run];
        float values[RUN];
        std::int32_t largest = 0; // as bits, which are ordered by size; NaN is the largest
        for (Index i = 0; i < n; ++i) {
            values[i] = line[p.order[column + i]];
            std::int32_t bits;
            std::memcpy(&bits, values + i, sizeof bits);
            bits &= 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        const float size = load<float>(&largest);
        std::int16_t *q = to.q + column * to.rows + place * n;
        float step = size / 32767, inverse = 32767 / size;
        if (!(size < INFINITY)) step = NAN; // and so is every result that uses it
        if (!(size > 0x1p-100f) || !(size < INFINITY)) inverse = 0;
        std::int32_t total = 0;
        for (Index i = 0; i < n; ++i) {
            // Adding 1.5 · 2^23 rounds to an integer, which its low bits then hold.
            const float magic = (inverse > 0 ? values[i] * inverse : 0.0f) + 0x1.8p23f;
            std::int32_t bits;
            std::memcpy(&bits, &magic, sizeof bits);
            const std::int32_t integer = bits - 0x4b400000;
            q[i] = static_cast<std::int16_t>(integer);
            total += integer;
        }
        to.step[run * to.rows + place] = step;
        to.total[run * to.rows + place] = step * static_cast<float>(total);
        column += n;
    }
}

template <int bits>
void tile_of_chunk(const Linear &p, Index tile, const Integers &x, Index first, Index rows, std::int32_t *pairs,
                   float *sums) {
    typedef Width<bits> W;
    std::memset(sums, 0, static_cast<std::size_t>(rows * TILE) * sizeof(float));
    const std::uint32_t *codes = p.codes + tile * p.words * TILE;
    const int wide = p.half ? 2 : 4;
    Index column = 0;
    for (Index run = 0; run < p.runs; ++run) {
        const Index n = p.run[2 * run], at = (tile * p.groups + p.run[2 * run + 1]) * TILE;
        const int units = static_cast<int>(n / (2 * W::pairs));
        const Scaling scaling{p.scales + at * wide, p.zeros ? p.zeros + at : nullptr, p.half, static_cast<float>(p.zero)};
        const std::int16_t *q = x.q + column * x.rows + first * n;
        const float *step = x.step + run * x.rows + first, *total = x.total + run * x.rows + first;
        if (rows <= 3) { // too few to pay for unpacking the pairs
            for (Index r = 0; r < rows; ++r)
                run_of_row<bits>(codes, q + r * n, units, scaling, step[r], total[r], sums + r * TILE);
        } else {
            unpack<bits>(codes, units, pairs);
            const int count = units * W::pairs;
            for (Index r = 0; r < rows; r += ROWS) {
                const auto some = [&](auto run) {
                    run(pairs, q + r * n, count, scaling, step + r, total + r, sums + r * TILE);
                };
                switch (rows - r) {
                    case 1: some(run_of_rows<1>); break;
                    case 2: some(run_of_rows<2>); break;
                    case 3: some(run_of_rows<3>); break;
                    case 4: some(run_of_rows<4>); break;
                    case 5: some(run_of_rows<5>); break;
                    default: some(run_of_rows<ROWS>);
                }
            }
        }
        codes += Index(units) * W::words * TILE;
        column += n;
    }
}

inline void write_out(const Linear &p, Index tile, Index first, Index rows, const float *sums) {
    const Index o = tile * TILE, wide = least(TILE, p.out - o);
    for (Index r = 0; r < rows; ++r) {
        const Index at = (first + r) * p.out + o;
        if (p.type == Type::float32) {
            std::memcpy(static_cast<float *>(p.y) + at, sums + r * TILE, static_cast<std::size_t>(wide) * 4);
            continue;
        }
        auto *y = static_cast<std::uint16_t *>(p.y) + at;
        if (p.type == Type::bfloat16) {
            for (Index i = 0; i < wide; ++i) y[i] = from_float(sums[r * TILE + i], Type::bfloat16);
        } else {
            for (Index i = 0; i < wide; ++i) y[i] = from_float(sums[r * TILE + i], Type::float16);
        }
    }
}

template <int bits>
void linear(const Linear &p, int threads) {
    const Index stretch = least(STRETCH, p.rows), tiles = (p.out + TILE - 1) / TILE;
    Scratch<std::int16_t> q(stretch * p.columns);
    Scratch<float> scales(2 * stretch * p.runs);
    for (Index start = 0; start < p.rows; start += stretch) {
        const Index rows = least(stretch, p.rows - start), chunks = (rows + CHUNK - 1) / CHUNK;
        const Integers x{q.get(), scales.get(), scales.get() + stretch * p.runs, rows};
        in_parallel(rows, rows > 4 ? threads : 1, [&](Parts &parts) {
            Scratch<float> line(p.in + 1);
            for (Index row; (row = parts.next()) >= 0;) make_integers(p, start + row, x, row, line.get());
        });
        // The tiles of a job are contiguous: few jobs, long streams from memory.
        const Index beside = std::max<Index>(1, tiles / (8 * threads)), jobs = (tiles + beside - 1) / beside;
        in_parallel(jobs * chunks, threads, [&](Parts &parts) {
            const Index most = least(CHUNK, rows);
            Scratch<float> sums(most * TILE);
            Scratch<std::int32_t> pairs(RUN / 2 * TILE);
            for (Index job; (job = parts.next()) >= 0;) {
                const Index first = job % chunks * CHUNK, mine = least(CHUNK, rows - first);
                for (Index tile = job / chunks * beside; tile < least((job / chunks + 1) * beside, tiles); ++tile) {
                    tile_of_chunk<bits>(p, tile, x, first, mine, pairs.get(), sums.get());
                    write_out(p, tile, start + first, mine, sums.get());
                }
            }
        });
    }
}

} // namespace

#define ROUNDWISE_JOIN(a, b) a##b
#define ROUNDWISE_CALL(a, b) ROUNDWISE_JOIN(a, b)
void ROUNDWISE_CALL(linear_, ROUNDWISE_ISA)(const Linear &p, int threads) {
    switch (p.bits) {
        case 2: return linear<2>(p, threads);
        case 3: return linear<3>(p, threads);
        case 4: return linear<4>(p, threads);
        default: return linear<8>(p, threads);
    }
}

} // namespace roundwise
