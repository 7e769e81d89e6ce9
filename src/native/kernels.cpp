// The solver's kernels, compiled once per instruction set: ROUNDWISE_ISA names it, its vectors hold
// ROUNDWISE_VECTOR bytes, ROUNDWISE_BESIDE of them are processed side by side. Lanes are independent of one
// another, so results do not depend on the vector width, only on whether there is fused multiply-add.
#include "exchange.hpp"
#include "simd.hpp"

#include <limits>

namespace roundwise {
namespace {

// Rounds positive x to float16, half to even, at least to its smallest positive value: adding 1.5 times a
// power of two, chosen so that the last place of the sum is the last place of x in float16, rounds there.
template <class T>
inline Vec<T> storable(Vec<T> x) {
    x = larger(x, splat<T>(T(5.9604644775390625e-8))); // 2^-24
    typename Simd<T>::Int bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits &= Simd<T>::exponent;
    Vec<T> power;
    std::memcpy(&power, &bits, sizeof power);
    const Vec<T> magic = larger(power, splat<T>(T(6.103515625e-5))) * Simd<T>::half; // 2^-14
    return (x + magic) - magic;
}

// Columns processed together, and vectors side by side: BLOCK x BESIDE vectors stay in registers.
constexpr int BLOCK = 4;
constexpr int BESIDE = ROUNDWISE_BESIDE;

// The recursion that all kernels here are made of: for j = 0, 1, …
//     E[j] = finish(j, base(j) + sum over i < j of E[i] * M[i, j])
// for K vectors side by side; E is [n, K].
template <class T, int B, int K, class Base, class Finish>
inline void step(Index j, const T *M, Index ld, Vec<T> *E, const Base &base, const Finish &finish) {
    Vec<T> sum[B][K];
    for (int c = 0; c < B; ++c)
        for (int k = 0; k < K; ++k) sum[c][k] = base(j + c, k);
    for (Index i = 0; i < j; ++i) {
        const T *m = M + i * ld + j;
        Vec<T> e[K];
        for (int k = 0; k < K; ++k) e[k] = E[i * K + k];
        for (int c = 0; c < B; ++c)
            for (int k = 0; k < K; ++k) sum[c][k] += e[k] * m[c];
    }
    for (int c = 0; c < B; ++c)
        for (int k = 0; k < K; ++k) {
            const Vec<T> e = finish(j + c, k, sum[c][k]);
            E[(j + c) * K + k] = e;
            for (int later = c + 1; later < B; ++later) sum[later][k] += e * M[(j + c) * ld + j + later];
        }
}

template <class T, int K, class Base, class Finish>
inline void sweep(Index n, const T *M, Index ld, Vec<T> *E, const Base &base, const Finish &finish) {
    Index j = 0;
    for (; j + BLOCK <= n; j += BLOCK) step<T, BLOCK, K>(j, M, ld, E, base, finish);
    for (; j < n; ++j) step<T, 1, K>(j, M, ld, E, base, finish);
}

// The grids of least cost for the rows in one vector, the best first.
template <class T>
struct Best {
    Index keep;
    Vec<T> *cost, *scale, *zero;

    void clear() {
        for (Index k = 0; k < keep; ++k) cost[k] = splat<T>(std::numeric_limits<T>::infinity());
    }
    void offer(Vec<T> c, Vec<T> s, Vec<T> z) {
        for (Index k = 0; k < keep; ++k) {
            const auto less = c < cost[k];
            const Vec<T> c0 = cost[k], s0 = scale[k], z0 = zero[k];
            cost[k] = less ? c : c0;
            scale[k] = less ? s : s0;
            zero[k] = less ? z : z0;
            c = less ? c0 : c;
            s = less ? s0 : s;
            z = less ? z0 : z;
        }
    }
};

template <class T>
struct Searcher {
    const Group<T> &g;
    const Vec<T> *W; // [columns]: the group's weights as updated by all finished columns
    Vec<T> low, high;
    bool fits = true;

    void range() {
        low = high = Vec<T>{};
        for (Index j = 0; j < g.columns; ++j) {
            low = smaller(low, W[j]);
            high = larger(high, W[j]);
        }
        if (g.search == Search::minmax && g.sym) {
            high = larger(high, -low);
            low = -high;
        }
        const auto empty = high == low;
        low = empty ? splat<T>(-1) : low;
        high = empty ? splat<T>(1) : high;
    }

    Vec<T> stored(Vec<T> scale) {
        const auto good = scale <= T(65504);
        for (int lane = 0; lane < Simd<T>::lanes; ++lane) fits = fits && good[lane];
        return storable<T>(scale);
    }

    void minmax(Vec<T> &scale, Vec<T> &zero) {
        range();
        const T maxq = static_cast<T>(g.maxq), lowest = static_cast<T>(g.min_zero);
        scale = (high - low) / maxq;
        if (g.sym) {
            scale = stored(scale);
            zero = splat<T>(static_cast<T>((g.maxq + 1) / 2));
            return;
        }
        scale = rounded<T>(smaller(-low / scale, splat<T>(maxq))) < lowest ? high / (maxq - lowest) : scale;
        scale = stored(scale);
        zero = nearest<T>(-low / scale, splat<T>(lowest), splat<T>(maxq));
    }

    // Weighed squared error of rounding the group to this grid.
    Vec<T> cost(Vec<T> scale, Vec<T> zero) const {
        const Vec<T> inverse = T(1) / scale, least = -zero, most = static_cast<T>(g.maxq) - zero;
        Vec<T> even{}, odd{};
        auto square = [&](Index j) {
            const Vec<T> e = nearest<T>(W[j] * inverse, least, most) * scale - W[j];
            return e * e;
        };
        Index j = 0;
        for (; j + 2 <= g.columns; j += 2) {
            even += square(j) * g.weights[j];
            odd += square(j + 1) * g.weights[j + 1];
        }
        if (j < g.columns) even += square(j) * g.weights[j];
        return even + odd;
    }

    void search(Best<T> &best) {
        range();
        best.clear();
        const T maxq = static_cast<T>(g.maxq), lowest = static_cast<T>(g.min_zero);
        const int middle = (g.maxq + 1) / 2;
        for (Index i = 0; i < g.shrinks; ++i) {
            const T part = g.shrink[i];
            if (g.sym) {
                const T below = static_cast<T>(middle), above = static_cast<T>(g.maxq - middle);
                const Vec<T> zero = splat<T>(below);
                const Vec<T> plain = stored(larger(-low / below, high / above) * part);
                best.offer(cost(plain, zero), plain, zero);
                if (g.turned) {
                    const Vec<T> turned = -stored(larger(high / below, -low / above) * part);
                    best.offer(cost(turned, zero), turned, zero);
                }
                continue;
            }
            const Vec<T> scale = stored((high - low) * (part / maxq));
            const Vec<T> centre = rounded<T>(maxq / 2 - (high + low) / (scale * 2));
            const bool all = g.maxq < 8;
            for (int offset = all ? g.min_zero : -2; offset <= (all ? g.maxq : 2); ++offset) {
                Vec<T> zero = all ? splat<T>(static_cast<T>(offset)) : centre + static_cast<T>(offset);
                zero = smaller(larger(zero, splat<T>(lowest)), splat<T>(maxq));
                best.offer(cost(scale, zero), scale, zero);
            }
        }
    }
};

// Rounds the group's columns with K grids side by side; returns the loss of each, and E [n, K].
template <class T, int K, class Keep>
void round_with(const Group<T> &g, const Vec<T> *target, const Vec<T> *start, const Vec<T> *scale,
                const Vec<T> *zero, Vec<T> *E, Vec<T> *loss, const Keep &keep) {
    Vec<T> s[K], low[K], high[K], sum[K];
    for (int k = 0; k < K; ++k) {
        s[k] = scale[k];
        low[k] = -zero[k];
        high[k] = static_cast<T>(g.maxq) - zero[k];
        sum[k] = Vec<T>{};
    }
    sweep<T, K>(
        g.columns, g.U, g.ld_u, E, [&](Index j, int) { return start[j]; },
        [&](Index j, int k, Vec<T> t) {
            const Vec<T> code = nearest<T>(t / s[k], low[k], high[k]);
            const Vec<T> q = code * s[k], d = t - q;
            sum[k] += d * d * g.D[j];
            keep(j, code);
            return target[j] - q;
        });
    for (int k = 0; k < K; ++k) loss[k] = sum[k];
}

template <class T>
bool group(const Group<T> &g, int threads) {
    constexpr int L = Simd<T>::lanes;
    bool fits = true;
    in_parallel((g.rows + L - 1) / L, threads, [&](Parts &parts) {
        const Index n = g.columns, keep = g.keep;
        const Index padded = (keep + BESIDE - 1) / BESIDE * BESIDE;
        Scratch<Vec<T>> memory(n * (3 + BESIDE) + 3 * padded + BESIDE);
        Vec<T> *target = memory.get(), *start = target + n, *W = start + n, *E = W + n;
        Best<T> best{keep, E + n * BESIDE, E + n * BESIDE + padded, E + n * BESIDE + 2 * padded};
        Vec<T> *loss = best.zero + padded;
        for (Index tile; (tile = parts.next()) >= 0;) {
            const Index row = tile * L;
            const int count = static_cast<int>(least(L, g.rows - row));
            for (Index j = 0; j < n; ++j) {
                target[j] = load<T>(g.target + j * g.ld_target + row, count);
                start[j] = load<T>(g.asked + j * g.ld_asked + row, count);
            }
            // W = target + asked U⁻¹, the group's weights while its own later columns are free to move:
            // M[j] = asked[j] - sum over i < j of M[i] U[i, j].
            sweep<T, 1>(
                n, g.U, g.ld_u, W, [&](Index j, int) { return -start[j]; },
                [&](Index, int, Vec<T> sum) { return -sum; });
            for (Index j = 0; j < n; ++j) {
                start[j] += target[j];
                W[j] += target[j];
            }
            Searcher<T> searcher{g, W, {}, {}};
            if (g.search == Search::minmax) {
                searcher.minmax(best.scale[0], best.zero[0]);
            } else {
                searcher.search(best);
            }
            if (g.search != Search::minmax && keep > 1) {
                for (Index k = keep; k < padded; ++k) {
                    best.scale[k] = best.scale[0];
                    best.zero[k] = best.zero[0];
                }
                Vec<T> lowest = splat<T>(std::numeric_limits<T>::infinity());
                Vec<T> scale = best.scale[0], zero = best.zero[0];
                for (Index k0 = 0; k0 < padded; k0 += BESIDE) {
                    round_with<T, BESIDE>(g, target, start, best.scale + k0, best.zero + k0, E, loss,
                                          [](Index, Vec<T>) {});
                    for (int k = 0; k < BESIDE; ++k) {
                        const auto less = loss[k] < lowest;
                        lowest = less ? loss[k] : lowest;
                        scale = less ? best.scale[k0 + k] : scale;
                        zero = less ? best.zero[k0 + k] : zero;
                    }
                }
                best.scale[0] = scale;
                best.zero[0] = zero;
            }
            const Vec<T> zero = best.zero[0];
            round_with<T, 1>(g, target, start, best.scale, best.zero, E, loss,
                             [&](Index j, Vec<T> code) {
                                 store_codes<T>(g.codes + j * g.ld_codes + row, code + zero, count);
                             });
            for (Index j = 0; j < n; ++j) store<T>(g.E + j * g.ld_E + row, E[j], count);
            store<T>(g.scale + row, best.scale[0], count);
            store<T>(g.zero + row, best.zero[0], count);
            store<T>(g.loss + row, loss[0], count);
            if (!searcher.fits) __atomic_store_n(&fits, false, __ATOMIC_RELAXED);
        }
    });
    return fits;
}

template <class T>
void known(const Known<T> &g, int threads) {
    constexpr int L = Simd<T>::lanes;
    in_parallel((g.rows + L - 1) / L, threads, [&](Parts &parts) {
        Scratch<Vec<T>> memory(2 * g.columns);
        Vec<T> *target = memory.get(), *E = target + g.columns;
        for (Index tile; (tile = parts.next()) >= 0;) {
            const Index row = tile * L;
            const int count = static_cast<int>(least(L, g.rows - row));
            Vec<T> loss{};
            sweep<T, 1>(
                g.columns, g.U, g.ld_u, E,
                [&](Index j, int) {
                    target[j] = load<T>(g.target + j * g.ld_target + row, count);
                    return target[j] + load<T>(g.asked + j * g.ld_asked + row, count);
                },
                [&](Index j, int, Vec<T> t) {
                    const Vec<T> scale = load<T>(g.scale + g.grid[j] * g.ld_scale + row, count);
                    const Vec<T> zero = load<T>(g.zero + g.grid[j] * g.ld_zero + row, count);
                    const Vec<T> high = static_cast<T>(g.maxq) - zero;
                    const Vec<T> code = nearest<T>(t / scale, -zero, high), d = t - code * scale;
                    loss += d * d * g.D[j];
                    store_codes<T>(g.codes + j * g.ld_codes + row, code + zero, count);
                    return target[j] - code * scale;
                });
            store<T>(g.loss + row, loss, count);
            for (Index j = 0; j < g.columns; ++j) store<T>(g.E + j * g.ld_E + row, E[j], count);
        }
    });
}

template <class T>
void descend(const Panel<T> &p, int threads) {
    constexpr int L = Simd<T>::lanes;
    in_parallel((p.rows + L - 1) / L, threads, [&](Parts &parts) {
        Scratch<Vec<T>> memory(p.columns);
        Vec<T> *moved = memory.get();
        for (Index tile; (tile = parts.next()) >= 0;) {
            const Index row = tile * L;
            const int count = static_cast<int>(least(L, p.rows - row));
            sweep<T, 1>(
                p.columns, p.H, p.ld_h, moved,
                [&](Index j, int) { return load<T>(p.G + j * p.ld_G + row, count); },
                [&](Index j, int, Vec<T> gradient) {
                    std::uint8_t *codes = p.codes + j * p.ld_codes + row;
                    const Vec<T> scale = load<T>(p.scale + p.grid[j] * p.ld_scale + row, count);
                    const Vec<T> zero = load<T>(p.zero + p.grid[j] * p.ld_zero + row, count);
                    const Vec<T> before = load_codes<T>(codes, count) - zero;
                    const Vec<T> best = before * scale - gradient / p.H[j * p.ld_h + j];
                    const Vec<T> high = static_cast<T>(p.maxq) - zero;
                    const Vec<T> after = nearest<T>(best / scale, -zero, high);
                    store_codes<T>(codes, after + zero, count);
                    return (after - before) * scale;
                });
            for (Index j = 0; j < p.columns; ++j)
                store<T>(p.change + j * p.ld_change + row, moved[j], count);
        }
    });
}

void pack(const std::uint8_t *codes, Index rows, Index columns, int bits, std::uint32_t *words,
          int threads) {
    constexpr Index tile_rows = 16;
    in_parallel((rows + tile_rows - 1) / tile_rows, threads, [&](Parts &parts) {
        for (Index tile; (tile = parts.next()) >= 0;) {
            const Index first = tile * tile_rows, last = least(first + tile_rows, rows);
            for (Index row = first; row < last; ++row) {
                std::uint64_t stream = 0; // codes not yet written, lowest bits first
                int held = 0;
                Index word = 0;
                for (Index j = 0; j < columns; ++j) {
                    stream |= static_cast<std::uint64_t>(codes[row * columns + j]) << held;
                    held += bits;
                    if (held >= 32) {
                        words[word++ * rows + row] = static_cast<std::uint32_t>(stream);
                        stream >>= 32;
                        held -= 32;
                    }
                }
            }
        }
    });
}

} // namespace

#define ROUNDWISE_TEXT(x) #x
#define ROUNDWISE_NAME(x) ROUNDWISE_TEXT(x)
const Kernels ROUNDWISE_ISA = {
    ROUNDWISE_NAME(ROUNDWISE_ISA), group<float>, group<double>, known<float>, known<double>,
    descend<float>, descend<double>, exchange<float>, exchange<double>, pack,
};

} // namespace roundwise
