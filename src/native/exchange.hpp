// Exchange: codes of one row that move together. The lanes of a vector are columns here, because other columns
// move in each row.
#pragma once
#include "kernels.hpp"
#include "simd.hpp"

#include <cmath>
#include <utility>

namespace roundwise {
namespace {

// MIN_DISTANCE and MIN_GAIN of core/backends/reference.py: how far from its best value, in steps, a column must
// be for an exchange to begin with it, and the smallest gain, as a part of what that step costs.
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
    const T maxq;
    Index padded;
    T *g, *trial; // gradient of the row as it is, and after the moves that are tried
    T *code;
    T *step, *own, *ratio; // scale s, s² H_jj, -1 / (s H_jj); a ratio of zero keeps a column where it is

    Row(const Panel<T> &panel, Index width, T *memory)
        : p(panel), maxq(static_cast<T>(panel.maxq)), padded(width), g(memory), trial(g + width),
          code(trial + width), step(code + width), own(step + width), ratio(own + width) {}

    void fill(Index row) {
        for (Index j = 0; j < padded; ++j) g[j] = code[j] = step[j] = own[j] = ratio[j] = T(0);
        for (Index j = 0; j < p.columns; ++j) {
            const Index group = p.grid[j];
            const T diagonal = p.H[j * p.ld_h + j];
            g[j] = p.G[j * p.ld_G + row];
            code[j] = static_cast<T>(p.codes[j * p.ld_codes + row]);
            step[j] = p.scale[group * p.ld_scale + row];
            own[j] = step[j] * step[j] * diagonal;
            ratio[j] = T(-1) / (step[j] * diagonal);
        }
    }

    // Returns by how many codes column i must move to come nearest to its best value.
    T best(Index i, T wanted) const {
        return nearest<T>(splat<T>(wanted), splat<T>(-code[i]), splat<T>(maxq - code[i]))[0];
    }

    // Moves column i to its best code, all others fixed.
    void settle(Index i) {
        const T codes = best(i, g[i] * ratio[i]);
        if (codes == T(0)) return;
        const T *H = p.H + i * p.ld_h;
        const T delta = codes * step[i];
        for (Index j = 0; j < p.columns; ++j) g[j] += H[j] * delta;
        code[i] += codes;
    }

    // Sets trial = from + H_j δ for the move; returns the best single move after it.
    Move answer(const T *from, const Move &move) {
        const T *H = p.H + move.column * p.ld_h;
        const T delta = move.codes * step[move.column];
        typename Simd<T>::Int index{}, at{};
        for (int lane = 0; lane < L; ++lane) index[lane] = lane;
        Vec<T> least{};
        const auto visit = [&](Index j, Vec<T> h) {
            const Vec<T> gradient = load<T>(from + j, L) + h * delta;
            store<T>(trial + j, gradient, L);
            const Vec<T> wanted = gradient * load<T>(ratio + j, L), now = load<T>(code + j, L);
            const Vec<T> codes = nearest<T>(wanted, -now, maxq - now);
            const Vec<T> cost = (codes - wanted * T(2)) * codes * load<T>(own + j, L);
            const auto less = cost < least;
            least = less ? cost : least;
            at = less ? index : at;
            index += L;
        };
        Index j = 0;
        for (; j + L <= p.columns; j += L) visit(j, load<T>(H + j, L));
        if (j < p.columns) visit(j, load<T>(H + j, static_cast<int>(p.columns - j)));
        T lanes[L]; // a copy: indexing the vector itself would make each lane wait for the one before
        store<T>(lanes, least, L);
        int lane = 0;
        T lowest = lanes[0];
        for (int other = 1; other < L; ++other)
            if (lanes[other] < lowest) lowest = lanes[lane = other];
        const Index column = static_cast<Index>(at[lane]);
        return {column, best(column, trial[column] * ratio[column]), lowest};
    }

    // Moves column i to its next best code, lets up to `moves` - 1 others answer, and keeps it if it helps.
    void attempt(Index i, Move *chain, int moves) {
        const T kept = ratio[i], wanted = g[i] * kept;
        T codes = best(i, wanted);
        if (codes == T(0)) {
            if (!(std::abs(wanted) >= T(REACH))) return;
            codes = wanted >= T(0) ? T(1) : T(-1);
        }
        if (code[i] + codes < T(0) || code[i] + codes > maxq) return;
        ratio[i] = T(0); // it must not move back
        chain[0] = {i, codes, (codes - wanted * T(2)) * codes * own[i]};
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
                code[next.column] += next.codes;
                chain[length++] = next;
            }
        }
        ratio[i] = kept;
        if (total < T(-WORTH) * own[i]) {
            if (!ended) answer(from, chain[length - 1]);
            std::swap(g, trial);
            code[i] += codes;
        } else {
            for (int k = 1; k < length; ++k) code[chain[k].column] -= chain[k].codes;
        }
    }

    void write(Index row) const {
        for (Index j = 0; j < p.columns; ++j) {
            std::uint8_t &stored = p.codes[j * p.ld_codes + row];
            p.change[j * p.ld_change + row] = (code[j] - static_cast<T>(stored)) * step[j];
            stored = static_cast<std::uint8_t>(code[j]);
        }
    }
};

template <class T>
void exchange(const Panel<T> &p, int moves, int threads) {
    constexpr Index L = Simd<T>::lanes;
    const Index padded = (p.columns + L - 1) / L * L;
    in_parallel(p.rows, threads, [&](Parts &parts) {
        Scratch<Vec<T>> memory(6 * padded / L);
        Scratch<typename Row<T>::Move> chain(moves);
        for (Index row; (row = parts.next()) >= 0;) {
            Row<T> state(p, padded, reinterpret_cast<T *>(memory.get()));
            state.fill(row);
            for (Index i = 0; i < p.columns; ++i) state.settle(i);
            for (Index i = 0; i < p.columns; ++i) state.attempt(i, chain.get(), moves);
            state.write(row);
        }
    });
}

} // namespace
} // namespace roundwise
