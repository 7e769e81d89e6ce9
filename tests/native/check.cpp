// Runs every kernel of the baseline on fixed pseudo-random input, holds what is simple to compute against slow,
// obvious code, and prints the other results. scripts/test-arm compiles it for this machine and for ARM, and
// compares what both print: one line per kernel, a name and numbers.
#include "../../src/native/kernels.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using namespace roundwise;

namespace {

std::uint64_t state = 1;

// A number from -1 to 1; the same sequence everywhere.
double uniform() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<double>(state >> 11) / 4503599627370496.0 - 1.0;
}

template <class T>
std::vector<T> numbers(std::size_t count) {
    std::vector<T> values(count);
    for (T &value : values) value = static_cast<T>(uniform());
    return values;
}

void require(bool holds, const char *what) {
    if (holds) return;
    std::printf("wrong: %s\n", what);
    std::exit(1);
}

template <class T>
void print(const char *name, const std::vector<T> &values) {
    std::printf("%s", name);
    for (T value : values) std::printf(" %.9g", static_cast<double>(value));
    std::printf("\n");
}

void check_moment() {
    const Index tokens = 70, m = 37, n = 41;
    for (bool turned : {false, true}) {
        const auto A = numbers<float>(tokens * m), B = numbers<float>(tokens * n);
        std::vector<float> C(m * n, 0.5f);
        moment_f32_baseline({tokens, m, n, A.data(), turned ? tokens : m, B.data(), n, C.data(), n, false, turned, 2.0f}, 3);
        for (Index i = 0; i < m; ++i)
            for (Index j = 0; j < n; ++j) {
                double sum = 0;
                for (Index t = 0; t < tokens; ++t) sum += double(turned ? A[i * tokens + t] : A[t * m + i]) * B[t * n + j];
                require(std::fabs(C[i * n + j] - 0.5 - 2 * sum) < 1e-4, "moment");
            }
    }
}

void check_pack() {
    const Index rows = 5, columns = 64;
    for (int bits : {2, 3, 4, 8}) {
        std::vector<std::uint8_t> codes(rows * columns);
        for (auto &code : codes) code = static_cast<std::uint8_t>(std::floor((uniform() + 1) * 0.499 * (1 << bits)));
        std::vector<std::uint32_t> words(columns * bits / 32 * rows);
        baseline.pack(codes.data(), rows, columns, bits, words.data(), 2);
        for (Index r = 0; r < rows; ++r)
            for (Index place = 0; place < columns * bits; ++place) {
                const unsigned stored = words[place / 32 * rows + r] >> place % 32 & 1;
                require(stored == (codes[r * columns + place / bits] >> place % bits & 1u), "pack");
            }
    }
}

// Weights of 4 bits in 16-bit halves, and 3 bits in the layout of linear.cpp, are made in Python; any words are
// weights, though, so that ARM and this machine can be compared.
void check_linear() {
    const Index in = 128, out = 70, rows = 9, tiles = (out + 63) / 64;
    for (int bits : {2, 3, 4, 8}) {
        const Index words = in * bits / 32;
        std::vector<std::uint32_t> codes(tiles * words * 64);
        for (auto &word : codes) word = static_cast<std::uint32_t>((uniform() + 1) * 2147483647.0);
        std::vector<float> scales(tiles * 64);
        for (auto &scale : scales) scale = static_cast<float>(0.01 + 0.005 * uniform());
        std::vector<std::int32_t> order(in), run{static_cast<std::int32_t>(in), 0};
        for (Index i = 0; i < in; ++i) order[i] = static_cast<std::int32_t>(i);
        const auto x = numbers<float>(rows * in);
        std::vector<float> y(rows * out), one(out);
        Linear p{rows, in, out, x.data(), y.data(), Type::float32, bits, codes.data(), words, 1,
                 reinterpret_cast<const std::uint8_t *>(scales.data()), false, nullptr, 1 << (bits - 1),
                 order.data(), in, run.data(), 1};
        linear_baseline(p, 2);
        p.rows = 1;
        p.y = one.data();
        linear_baseline(p, 1);
        for (Index o = 0; o < out; ++o) require(one[o] == y[o], "a row alone");
        print("linear", y);
    }
}

void check_dense() {
    const Index in = 96, out = 50;
    for (Type type : {Type::float16, Type::bfloat16}) {
        std::vector<std::uint16_t> x(2 * in), W(out * in), y(2 * out);
        // Bit patterns of finite numbers of both types, near 1.
        for (auto *values : {&x, &W})
            for (auto &value : *values) value = static_cast<std::uint16_t>(0x3c00 + (uniform() + 1) * 255 + (uniform() < 0 ? 0x8000 : 0));
        dense_baseline({2, in, out, x.data(), W.data(), y.data(), type}, 2);
        print("dense", y);
    }
}

template <class T>
void check_group(bool (*group)(const Group<T> &, int), void (*known)(const Known<T> &, int),
                 void (*descend)(const Panel<T> &, int), void (*exchange)(const Panel<T> &, int, int)) {
    const Index n = 32, rows = 21;
    auto U = numbers<T>(n * n);
    for (Index i = 0; i < n; ++i)
        for (Index j = 0; j < n; ++j) U[i * n + j] = i == j ? T(1) : i < j ? U[i * n + j] / 8 : T(0);
    std::vector<T> D(n), shrink{T(1), T(0.9), T(0.8), T(0.7)}, asked(n * rows);
    for (auto &d : D) d = T(1.5 + uniform());
    const auto target = numbers<T>(n * rows);
    for (bool sym : {true, false}) {
        std::vector<T> scale(rows), zero(rows), loss(rows), E(n * rows);
        std::vector<std::uint8_t> codes(n * rows);
        require(group({n, rows, U.data(), n, D.data(), target.data(), asked.data(), rows, rows, Search::weighted,
                       D.data(), shrink.data(), 4, 2, 15, 0, sym, sym, scale.data(), zero.data(), loss.data(),
                       codes.data(), rows, E.data(), rows}, 2), "group");
        for (Index j = 0; j < n; ++j)
            for (Index r = 0; r < rows; ++r) {
                const T value = scale[r] * (T(codes[j * rows + r]) - zero[r]);
                require(std::fabs(target[j * rows + r] - value - E[j * rows + r]) < T(1e-5), "E");
            }
        print("scale", scale);
        print("loss", loss);
        print("codes", codes);
        const std::vector<Index> grid(n, 0);
        std::vector<std::uint8_t> again(n * rows);
        known({n, rows, U.data(), n, D.data(), target.data(), asked.data(), rows, rows, scale.data(), zero.data(),
               rows, rows, grid.data(), 15, loss.data(), again.data(), rows, E.data(), rows}, 2);
        require(again == codes, "known");
        std::vector<T> H(n * n), G(n * rows), change(n * rows);
        for (Index i = 0; i < n; ++i)
            for (Index j = 0; j < n; ++j)
                for (Index k = 0; k < n; ++k) H[i * n + j] += U[i * n + k] * D[k] * U[j * n + k];
        for (Index i = 0; i < n; ++i)
            for (Index r = 0; r < rows; ++r)
                for (Index k = 0; k < n; ++k) G[i * rows + r] -= H[i * n + k] * E[k * rows + r];
        const Panel<T> panel{n, rows, H.data(), n, G.data(), rows, scale.data(), zero.data(), rows, rows,
                             grid.data(), 15, again.data(), rows, change.data(), rows};
        descend(panel, 2);
        print("descend", again);
        again = codes;
        exchange(panel, 4, 2);
        print("exchange", again);
    }
}

} // namespace

int main() {
    check_moment();
    check_pack();
    check_linear();
    check_dense();
    check_group<float>(baseline.group_f32, baseline.known_f32, baseline.descend_f32, baseline.exchange_f32);
    check_group<double>(baseline.group_f64, baseline.known_f64, baseline.descend_f64, baseline.exchange_f64);
}
