// Interface of the kernels, one set per instruction set. Matrices are row-major: pointer, sizes, strides in
// entries. Columns of a weight are rows here: [columns, rows of the weight], so that the lanes of a
// vector are rows of the weight, which are independent of one another given the Hessian.
#pragma once
#include <cstdint>

namespace roundwise {

using Index = std::int64_t;

enum class Search : int { minmax = 0, weighted = 1 };

// One group of columns whose grid is searched; core/backends/reference.py has the maths.
template <class T>
struct Group {
    Index columns, rows;
    const T *U; // U[i * ld_u + j], i and j within the group
    Index ld_u;
    const T *D; // [columns]: the cost of a squared error in each column
    const T *target, *asked; // [columns, rows]: T, and the feedback of finished columns
    Index ld_target, ld_asked;
    Search search;
    const T *weights; // [columns]: weights of squared errors in the search
    const T *shrink; // ranges tried, as parts of the full one
    Index shrinks, keep;
    int maxq, min_zero;
    bool sym, turned;
    T *scale, *zero, *loss; // out: [rows]
    std::uint8_t *codes; // out: [columns, rows]
    Index ld_codes;
    T *E; // out: [columns, rows], target - value
    Index ld_E;
};

// Columns whose grids are known: grid[j] is the row of `scale` and `zero` that column j uses.
template <class T>
struct Known {
    Index columns, rows;
    const T *U;
    Index ld_u;
    const T *D;
    const T *target, *asked;
    Index ld_target, ld_asked;
    const T *scale, *zero; // [groups, rows]
    Index ld_scale, ld_zero;
    const Index *grid; // [columns]
    int maxq;
    T *loss; // out: [rows]
    std::uint8_t *codes;
    Index ld_codes;
    T *E;
    Index ld_E;
};

// Descent or exchange on a panel of columns: G = (Q - T)H before any of them moves.
template <class T>
struct Panel {
    Index columns, rows;
    const T *H; // H[i * ld_h + j] within the panel
    Index ld_h;
    const T *G; // [columns, rows]
    Index ld_G;
    const T *scale, *zero; // [groups, rows]
    Index ld_scale, ld_zero;
    const Index *grid; // [columns]
    int maxq;
    std::uint8_t *codes; // in and out: [columns, rows]
    Index ld_codes;
    T *change; // out: [columns, rows], by how much each value moved
    Index ld_change;
};

// C[m, n] += scale * A[tokens, m]ᵀ B[tokens, n]; float32, or bfloat16 with float32 sums.
struct Moment {
    Index tokens, m, n;
    const void *A;
    Index ld_A;
    const void *B;
    Index ld_B;
    float *C;
    Index ld_C;
    bool lower; // A is B, and blocks of C above the diagonal are not needed
    bool turned; // A is given as [m, tokens]; not for bfloat16
    float scale; // factor of what is added
};

// y[rows, out] = x[rows, in] Wᵀ from codes in tiles of 64 output channels.
enum class Type { float32, float16, bfloat16 };
struct Linear {
    Index rows, in, out;
    const void *x;
    void *y; // of the same type
    Type type;
    int bits;                    // 2, 3, 4, 8
    const std::uint32_t *codes;  // [tiles, words, 64]; `linear.cpp` has the layout of a word
    Index words, groups;
    const std::uint8_t *scales;  // [tiles, groups, 64] of float16 (half) or float32
    bool half;
    const std::uint8_t *zeros;   // [tiles, groups, 64]; null: all are `zero`
    int zero;
    const std::int32_t *order;   // [columns]: column of x for each column of codes; `in` for padding
    Index columns;
    const std::int32_t *run;     // [runs, 2]: number of columns, at most 128, and their group
    Index runs;
};

// y[rows, out] = x[rows, in] Wᵀ, all in one type of 16 bits; at most 2 rows; `in` a multiple of 32.
struct Dense {
    Index rows, in, out;
    const void *x, *W;
    void *y;
    Type type;
};

// The kernels of one instruction set. `group` returns false where a scale does not fit float16.
struct Kernels {
    const char *name;
    bool (*group_f32)(const Group<float> &, int threads);
    bool (*group_f64)(const Group<double> &, int threads);
    void (*known_f32)(const Known<float> &, int threads);
    void (*known_f64)(const Known<double> &, int threads);
    void (*descend_f32)(const Panel<float> &, int threads);
    void (*descend_f64)(const Panel<double> &, int threads);
    void (*exchange_f32)(const Panel<float> &, int moves, int threads);
    void (*exchange_f64)(const Panel<double> &, int moves, int threads);
    // codes [rows, columns] to words [columns * bits / 32, rows], lowest bits first.
    void (*pack)(const std::uint8_t *codes, Index rows, Index columns, int bits,
                 std::uint32_t *words, int threads);
};

void moment_f32_baseline(const Moment &, int threads);
void linear_baseline(const Linear &, int threads);
void dense_baseline(const Dense &, int threads);

extern const Kernels baseline;
#ifdef ROUNDWISE_X86
extern const Kernels avx2, avx512;
void moment_f32_avx2(const Moment &, int threads);
void moment_f32_avx512(const Moment &, int threads);
void moment_bf16_avx512bf16(const Moment &, int threads);
void linear_avx2(const Linear &, int threads);
void dense_avx2(const Dense &, int threads);
void linear_avx512(const Linear &, int threads);
void dense_avx512(const Dense &, int threads);
void linear_avx512vnni(const Linear &, int threads);
#endif

} // namespace roundwise
