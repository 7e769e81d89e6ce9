// Codes of one row that move together. The lanes of a vector are columns here, because which columns move
// is another matter in each row.
#pragma once
#include "kernels.hpp"
#include "simd.hpp"

#include <cmath>
#include <utility>

namespace roundwise {
namespace {

// As in core/recursion.py: how far from its best value a column must be for its other code to be tried, in
// steps, and which part of the cost of such a step must be won.
constexpr double REACH = 0.25, WORTH = 1e-4;

// One row of a panel; all arrays are [columns], padded with columns that cannot move.
template <class T>
struct Row {
    static constexpr int L = Simd<T>::lanes;
    struct Move {
        Index column;
        T codes, cost;
    };

    const Panel<T> &p;
    Index padded;
    T *g, *trial; // gradient: of the row as it is, and after the moves that are tried
    T *low, *high; // by how many codes a column may still move
    T *step, *own, *ratio; // scale s, s² H_jj, -1 / (s H_jj)

    Row(const Panel<T> &panel, Index width, T *memory)
        : p(panel), padded(width), g(memory), trial(g + width), low(trial + width), high(low + width),
          step(high + width), own(step + width), ratio(own + width) {}

    void fill(Index row) {
        const T maxq = static_cast<T>(p.maxq);
        for (Index j = 0; j < padded; ++j) g[j] = low[j] = high[j] = step[j] = own[j] = ratio[j] = T(0);
        for (Index j = 0; j < p.columns; ++j) {
            const Index group = p.grid[j];
            const T diagonal = p.H[j * p.ld_h + j], code = static_cast<T>(p.codes[j * p.ld_codes + row]);
            g[j] = p.G[j * p.ld_G + row];
            low[j] = -code;
            high[j] = maxq - code;
            step[j] = p.scale[group * p.ld_scale + row];
            own[j] = step[j] * step[j] * diagonal;
            ratio[j] = T(-1) / (step[j] * diagonal);
        }
    }

    // trial = from + H_j δ for the move, and the best single move after it.
    Move answer(const T *from, const Move &move) {
        const T *H = p.H + move.column * p.ld_h;
        const T delta = move.codes * step[move.column];
        typename Simd<T>::Int index{}, at{};
        for (int lane = 0; lane < L; ++lane) index[lane] = lane;
        Vec<T> least{};
        for (Index j = 0; j < padded; j += L) {
            const Vec<T> h = load<T>(H + j, static_cast<int>(roundwise::least(L, p.columns - j)));
            const Vec<T> gradient = load<T>(from + j, L) + h * delta;
            store<T>(trial + j, gradient, L);
            const Vec<T> codes = nearest<T>(gradient * load<T>(ratio + j, L), load<T>(low + j, L),
                                            load<T>(high + j, L));
            const Vec<T> cost = (gradient * load<T>(step + j, L) * T(2) + codes * load<T>(own + j, L)) * codes;
            const auto less = cost < least;
            least = less ? cost : least;
            at = less ? index : at;
            index += L;
        }
        T lanes[L]; // not indexed in the vector itself: each lane would wait for the one before
        store<T>(lanes, least, L);
        int best = 0;
        T lowest = lanes[0];
        for (int lane = 1; lane < L; ++lane)
            if (lanes[lane] < lowest) lowest = lanes[best = lane];
        const Index column = static_cast<Index>(at[best]);
        const T wanted = trial[column] * ratio[column];
        const T codes = nearest<T>(splat<T>(wanted), splat<T>(low[column]), splat<T>(high[column]))[0];
        return {column, codes, lowest};
    }

    void apply(const Move &move, T sign) {
        low[move.column] -= sign * move.codes;
        high[move.column] -= sign * move.codes;
    }

    // Moves column i to its best other code, lets up to `moves` - 1 others answer, and keeps it if it helps.
    void attempt(Index i, Move *chain, int moves) {
        const T wanted = g[i] * ratio[i];
        T codes = nearest<T>(splat<T>(wanted), splat<T>(low[i]), splat<T>(high[i]))[0];
        if (codes == T(0)) {
            if (!(std::abs(wanted) >= T(REACH))) return;
            codes = wanted >= T(0) ? T(1) : T(-1);
        }
        if (codes < low[i] || codes > high[i]) return;
        const T below = low[i], above = high[i];
        low[i] = high[i] = T(0); // it must not move back
        chain[0] = {i, codes, (T(2) * step[i] * g[i] + own[i] * codes) * codes};
        T total = chain[0].cost;
        int length = 1;
        bool ended = false;
        const T *from = g;
        while (length < moves && !ended) {
            const Move next = answer(from, chain[length - 1]);
            from = trial;
            ended = !(next.cost < T(0));
            if (!ended) {
                total += next.cost;
                apply(next, T(1));
                chain[length++] = next;
            }
        }
        low[i] = below;
        high[i] = above;
        if (total < T(-WORTH) * own[i]) {
            if (!ended) answer(from, chain[length - 1]);
            std::swap(g, trial);
            apply(chain[0], T(1));
        } else {
            for (int k = 1; k < length; ++k) apply(chain[k], T(-1));
        }
    }

    void write(Index row) const {
        for (Index j = 0; j < p.columns; ++j) {
            std::uint8_t &code = p.codes[j * p.ld_codes + row];
            const T after = -low[j];
            p.change[j * p.ld_change + row] = (after - static_cast<T>(code)) * step[j];
            code = static_cast<std::uint8_t>(after);
        }
    }
};

template <class T>
void exchange(const Panel<T> &p, int moves, int threads) {
    constexpr Index L = Simd<T>::lanes;
    const Index padded = (p.columns + L - 1) / L * L;
    in_parallel(p.rows, threads, [&](Parts &parts) {
        Scratch<Vec<T>> memory(7 * padded / L);
        Scratch<typename Row<T>::Move> chain(moves);
        for (Index row; (row = parts.next()) >= 0;) {
            Row<T> state(p, padded, reinterpret_cast<T *>(memory.get()));
            state.fill(row);
            for (Index i = 0; i < p.columns; ++i) state.attempt(i, chain.get(), moves);
            state.write(row);
        }
    });
}

} // namespace
} // namespace roundwise
