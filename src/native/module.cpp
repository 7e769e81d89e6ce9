// roundwise._native: passes arrays from Python to the kernels of this processor's instruction set. Checks
// shapes and strides, so that a mistake in Python cannot become a wild pointer. Does not depend on torch.
#include "kernels.hpp"
#include "threads.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace nb = nanobind;
using namespace roundwise;

namespace {

template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;
template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::device::cpu>;

const Kernels *chosen = nullptr;

std::vector<const Kernels *> supported() {
    std::vector<const Kernels *> found;
#ifdef ROUNDWISE_X86
    if (__builtin_cpu_supports("x86-64-v4")) found.push_back(&avx512);
    if (__builtin_cpu_supports("x86-64-v3")) found.push_back(&avx2);
#endif
    found.push_back(&baseline);
    return found;
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels *kernels : supported()) names.emplace_back(kernels->name);
    return names;
}

void use(const std::string &name) {
    for (const Kernels *kernels : supported()) {
        if (name == kernels->name) {
            chosen = kernels;
            return;
        }
    }
    throw std::invalid_argument("this processor has no " + name);
}

void require(bool holds, const char *what) {
    if (!holds) throw std::invalid_argument(std::string("roundwise._native: ") + what);
}

// A matrix of this shape whose rows are contiguous; returns the distance between rows.
template <class M>
Index rows_of(const M &matrix, Index rows, Index columns, const char *what) {
    require(Index(matrix.shape(0)) == rows && Index(matrix.shape(1)) == columns, what);
    require(matrix.stride(1) == 1 || columns <= 1, what);
    require(matrix.stride(0) >= columns || rows <= 1, what);
    // The stride of a single row means nothing; torch up to 2.6 gives 1.
    return rows <= 1 ? columns : Index(matrix.stride(0));
}
template <class V>
void vector_of(const V &vector, Index length, const char *what) {
    require(Index(vector.shape(0)) == length && (vector.stride(0) == 1 || length <= 1), what);
}
template <class M>
void grid_of(const Vector<const Index> &grid, Index columns, const M &scale) {
    vector_of(grid, columns, "grid");
    for (Index j = 0; j < columns; ++j)
        require(grid.data()[j] >= 0 && grid.data()[j] < Index(scale.shape(0)), "grid");
}

template <class T>
bool group(Matrix<const T> U, Vector<const T> D, Matrix<const T> target, Matrix<const T> asked,
           bool weighted, Vector<const T> weights, Vector<const T> shrink, int keep, int maxq,
           int min_zero, bool sym, bool turned, Vector<T> scale, Vector<T> zero, Vector<T> loss,
           Matrix<std::uint8_t> codes, Matrix<T> E, int threads) {
    const Index n = target.shape(0), rows = target.shape(1);
    require(keep >= 1 && maxq >= 1 && maxq <= 255 && min_zero >= 0 && min_zero < maxq, "settings");
    vector_of(D, n, "D");
    vector_of(weights, n, "weights");
    vector_of(scale, rows, "scale");
    vector_of(zero, rows, "zero");
    vector_of(loss, rows, "loss");
    const Group<T> g{
        n, rows, U.data(), rows_of(U, n, n, "U"), D.data(), target.data(), asked.data(),
        rows_of(target, n, rows, "target"), rows_of(asked, n, rows, "asked"),
        weighted ? Search::weighted : Search::minmax, weights.data(), shrink.data(),
        Index(shrink.shape(0)), keep, maxq, min_zero, sym, turned, scale.data(), zero.data(), loss.data(),
        codes.data(), rows_of(codes, n, rows, "codes"), E.data(), rows_of(E, n, rows, "E"),
    };
    nb::gil_scoped_release release;
    if constexpr (sizeof(T) == 4) {
        return chosen->group_f32(g, threads);
    } else {
        return chosen->group_f64(g, threads);
    }
}

template <class T>
void known(Matrix<const T> U, Vector<const T> D, Matrix<const T> target, Matrix<const T> asked, Matrix<const T> scale,
           Matrix<const T> zero, Vector<const Index> grid, int maxq, Vector<T> loss,
           Matrix<std::uint8_t> codes, Matrix<T> E, int threads) {
    const Index n = target.shape(0), rows = target.shape(1), groups = scale.shape(0);
    grid_of(grid, n, scale);
    vector_of(D, n, "D");
    vector_of(loss, rows, "loss");
    const Known<T> g{
        n, rows, U.data(), rows_of(U, n, n, "U"), D.data(), target.data(), asked.data(),
        rows_of(target, n, rows, "target"), rows_of(asked, n, rows, "asked"), scale.data(),
        zero.data(), rows_of(scale, groups, rows, "scale"), rows_of(zero, groups, rows, "zero"),
        grid.data(), maxq, loss.data(), codes.data(), rows_of(codes, n, rows, "codes"), E.data(),
        rows_of(E, n, rows, "E"),
    };
    nb::gil_scoped_release release;
    if constexpr (sizeof(T) == 4) {
        chosen->known_f32(g, threads);
    } else {
        chosen->known_f64(g, threads);
    }
}

// At most `moves` codes of a row are moved together; 1: coordinate descent.
template <class T>
void descend(Matrix<const T> H, Matrix<const T> G, Matrix<const T> scale, Matrix<const T> zero,
             Vector<const Index> grid, int maxq, Matrix<std::uint8_t> codes, Matrix<T> change,
             int moves, int threads) {
    const Index n = G.shape(0), rows = G.shape(1), groups = scale.shape(0);
    require(moves >= 1, "moves");
    grid_of(grid, n, scale);
    const Panel<T> p{
        n, rows, H.data(), rows_of(H, n, n, "H"), G.data(), rows_of(G, n, rows, "G"), scale.data(),
        zero.data(), rows_of(scale, groups, rows, "scale"), rows_of(zero, groups, rows, "zero"),
        grid.data(), maxq, codes.data(), rows_of(codes, n, rows, "codes"), change.data(),
        rows_of(change, n, rows, "change"),
    };
    nb::gil_scoped_release release;
    if constexpr (sizeof(T) == 4) {
        moves == 1 ? chosen->descend_f32(p, threads) : chosen->exchange_f32(p, moves, threads);
    } else {
        moves == 1 ? chosen->descend_f64(p, threads) : chosen->exchange_f64(p, moves, threads);
    }
}

void pack(Matrix<const std::uint8_t> codes, int bits, Matrix<std::int32_t> words, int threads) {
    const Index rows = codes.shape(0), columns = codes.shape(1);
    require(bits >= 1 && bits <= 8 && columns * bits % 32 == 0, "bits");
    require(rows_of(codes, rows, columns, "codes") == columns || rows <= 1, "codes");
    require(rows_of(words, columns * bits / 32, rows, "words") == rows || columns == 0, "words");
    nb::gil_scoped_release release;
    chosen->pack(codes.data(), rows, columns, bits, reinterpret_cast<std::uint32_t *>(words.data()),
                 threads);
}

void sum_f32(const Moment &p, int threads) {
#ifdef ROUNDWISE_X86
    if (chosen == &avx512) return moment_f32_avx512(p, threads);
    if (chosen == &avx2) return moment_f32_avx2(p, threads);
#endif
    moment_f32_baseline(p, threads);
}

// Returns whether `moment` takes bfloat16: only where one instruction multiplies pairs of it.
bool has_bf16() {
#ifdef ROUNDWISE_X86
    return chosen == &avx512 && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

template <class T>
void moment(Matrix<const T> A, Matrix<const T> B, Matrix<float> C, bool lower, bool turned, float scale,
            int threads) {
    const Index tokens = B.shape(0), m = A.shape(turned ? 0 : 1), n = B.shape(1);
    require(!lower || m == n, "C");
    require(!turned || sizeof(T) == 4, "A");
    const Index ld_A = turned ? rows_of(A, m, tokens, "A") : rows_of(A, tokens, m, "A");
    const Moment p{
        tokens, m, n, A.data(), ld_A, B.data(), rows_of(B, tokens, n, "B"),
        C.data(), rows_of(C, m, n, "C"), lower, turned, scale,
    };
    require(sizeof(T) == 4 || has_bf16(), "this processor multiplies no bfloat16");
    // Starting a thread pays from some millions of products on.
    const double work = static_cast<double>(tokens) * static_cast<double>(m) * static_cast<double>(n);
    threads = std::min(threads, 1 + static_cast<int>(std::min(work / 4e6, 1e6)));
    nb::gil_scoped_release release;
    if constexpr (sizeof(T) == 4) {
        sum_f32(p, threads);
    } else {
#ifdef ROUNDWISE_X86
        moment_bf16_avx512bf16(p, threads);
#endif
    }
}

const std::int32_t *integers(const Vector<const std::int32_t> &array, Index length, const char *what) {
    vector_of(array, length, what);
    return array.data();
}

// A layer's weight, checked once; the caller keeps the arrays alive.
class PackedLinear {
public:
    PackedLinear(Index in, Index out, int bits, Vector<const std::int32_t> codes, Vector<const std::uint8_t> scales,
                 bool half, Vector<const std::uint8_t> zeros, int zero, Vector<const std::int32_t> order,
                 Vector<const std::int32_t> runs, Index groups) {
        const Index tiles = (out + 63) / 64, columns = Index(order.shape(0)), count = Index(runs.shape(0)) / 2;
        require(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits");
        require(in > 0 && out > 0 && columns % (bits == 3 ? 32 : 32 / bits) == 0, "columns");
        const Index words = columns * bits / 32;
        vector_of(codes, tiles * words * 64, "codes");
        vector_of(scales, tiles * groups * 64 * (half ? 2 : 4), "scales");
        const bool varied = zeros.shape(0) > 0;
        vector_of(zeros, varied ? tiles * groups * 64 : 0, "zeros");
        Index covered = 0;
        for (Index i = 0; i < count; ++i) {
            const std::int32_t n = runs.data()[2 * i], group = runs.data()[2 * i + 1];
            require(n > 0 && n <= 128 && n % (bits == 3 ? 32 : 32 / bits) == 0, "runs");
            require(group >= 0 && group < groups, "runs");
            covered += n;
        }
        require(covered == columns, "runs");
        for (Index i = 0; i < columns; ++i) require(order.data()[i] >= 0 && order.data()[i] <= in, "order");
        linear_ = Linear{
            0, in, out, nullptr, nullptr, Type::float32, bits, reinterpret_cast<const std::uint32_t *>(codes.data()),
            words, groups, scales.data(), half, varied ? zeros.data() : nullptr, zero,
            integers(order, columns, "order"), columns, integers(runs, 2 * count, "runs"), count,
        };
    }

    // x [rows, in] and y [rows, out] as addresses: checking arrays would take as long as a small product.
    void multiply(std::uintptr_t x, std::uintptr_t y, Index rows, Index in, int type, int threads) const {
        require(in == linear_.in && type >= 0 && type <= 2, "x");
        Linear p = linear_;
        p.x = reinterpret_cast<const void *>(x);
        p.y = reinterpret_cast<void *>(y);
        p.rows = rows;
        p.type = static_cast<Type>(type);
        // Starting a thread pays from some tens of thousands of products on.
        const Index work = rows * p.out * p.columns;
        threads = static_cast<int>(std::min<Index>(threads, 1 + work / 100'000));
        nb::gil_scoped_release release;
#ifdef ROUNDWISE_X86
        if (chosen == &avx512) return __builtin_cpu_supports("avx512vnni") ? linear_avx512vnni(p, threads) : linear_avx512(p, threads);
        if (chosen == &avx2) return linear_avx2(p, threads);
#endif
        linear_baseline(p, threads);
    }

private:
    Linear linear_;
};

// x [rows, in], W [out, in] and y [rows, out] as addresses, as in PackedLinear::multiply.
void dense(std::uintptr_t x, std::uintptr_t W, std::uintptr_t y, Index rows, Index in, Index out, int type, int threads) {
    require(rows >= 1 && rows <= 2 && in > 0 && in % 32 == 0 && out > 0 && (type == 1 || type == 2), "dense");
    const Dense p{rows, in, out, reinterpret_cast<const void *>(x), reinterpret_cast<const void *>(W),
                  reinterpret_cast<void *>(y), static_cast<Type>(type)};
    nb::gil_scoped_release release;
#ifdef ROUNDWISE_X86
    if (chosen == &avx512) return dense_avx512(p, threads);
    if (chosen == &avx2) return dense_avx2(p, threads);
#endif
    dense_baseline(p, threads);
}

template <class T>
void bind(nb::module_ &m) {
    m.def("group", &group<T>);
    m.def("known", &known<T>);
    m.def("descend", &descend<T>);
}

} // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false); // a model that lives until the interpreter exits is not a leak
    chosen = supported().front();
    m.doc() = "The solver's inner loops in C++; core/backends/cpp.py is the one who calls them.";
    m.def("instruction_sets", &instruction_sets, "What this processor can run, the widest first.");
    m.def("active", [] { return std::string(chosen->name); });
    m.def("use", &use);
    bind<float>(m);
    bind<double>(m);
    m.def("pack", &pack);
    m.def("use_team", [](std::uintptr_t address) { use_team(reinterpret_cast<RunOnTeam>(address)); },
          "Address of GOMP_parallel in the OpenMP runtime whose threads are to be used; 0: none.");
    nb::class_<PackedLinear>(m, "PackedLinear")
        .def(nb::init<Index, Index, int, Vector<const std::int32_t>, Vector<const std::uint8_t>, bool,
                      Vector<const std::uint8_t>, int, Vector<const std::int32_t>, Vector<const std::int32_t>, Index>())
        .def("multiply", &PackedLinear::multiply);
    m.def("dense", &dense);
    m.def("has_bf16", &has_bf16);
    m.def("moment", &moment<float>);
    m.def("moment_bf16", &moment<std::uint16_t>, "bfloat16 as its 16 bits.");
}
