"""Triton programs: products with packed weights on a GPU, dequantized on the way.

They know pointers, sizes and the layout of the words, nothing of layers or of how they are chosen
(`triton.py`). This file needs triton and is imported with the first product.

A code becomes a number without a conversion instruction, which a GPU has few of. Its bits, masked where
they stand in the word, become mantissa bits of 2^23, and one multiply-add does the rest, exactly:

    word & (15 << p) | bits of 2^23     2^23 + code·2^p      as float32; p + 4 <= 23
    · 2^-p - (2^(23-p) + zero)          code - zero

Such integers are exact in bfloat16 and float16 too, so the tensor cores multiply exact values; a group's
scale is applied to its float32 sum. No dtype costs accuracy, except in what goes in and comes out.

3 bit words come as planes (`triton.py` draws them) and are joined to words of eight 4 bit fields.
"""

import triton
import triton.language as tl

#: Triton's interpreter multiplies the bits of bfloat16 as integers: it gets float32 of the same values.
SIMULATED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _integers(word, zero, magic, bit, FIELD: tl.constexpr):
    """Code - zero, float32, for the field of `word` that starts at `bit`, of FIELD bits.

    `magic` holds the bits of 2^23 and is an argument of the programs: as a constant it would cost an
    instruction more for each code, since one takes no two immediates.
    """
    shift = tl.where(bit + FIELD > 23, 16, 0)
    place = bit - shift
    field = (word >> shift) & (((1 << FIELD) - 1) << place)
    value = (field | magic).to(tl.float32, bitcast=True)
    unit = ((127 - place) << 23).to(tl.float32, bitcast=True)
    return value * unit - (zero + ((150 - place) << 23).to(tl.float32, bitcast=True))


@triton.jit
def _rows(pointer, rows, live, n, N):
    """[BN, len(rows)]: some rows of a matrix [..., N], as columns; 0 where `live` [len(rows)] is not."""
    mask = (n < N)[:, None] & live[None, :]
    return tl.load(pointer + rows[None, :] * N + n[:, None], mask=mask, other=0)


@triton.jit
def _words(words_ptr, tile, K, n, N, BITS: tl.constexpr, BK: tl.constexpr):
    """[BN, BK·FIELD/32]: the words of a tile of BK input channels, 3 bit codes in 4 bit fields."""
    if BITS == 3:
        # Planes of 32 codes: two words of low bits, one of high bits.
        block = tile * (BK // 32) + tl.arange(0, BK // 32)
        half = tile * (BK // 16) + tl.arange(0, BK // 16)
        low = _rows(words_ptr, half + half // 2, half * 16 < K, n, N)
        high = _rows(words_ptr, 3 * block + 2, block * 32 < K, n, N)
        low = tl.interleave(low, low >> 2) & 0x33333333
        high = tl.interleave(high, high >> 2)
        high = tl.interleave(high, high >> 1) & 0x11111111
        return low | (high << 2)
    else:
        row = tile * (BK * BITS // 32) + tl.arange(0, BK * BITS // 32)
        return _rows(words_ptr, row, row * (32 // BITS) < K, n, N)


@triton.jit
def _dequantized(words, zero, magic, FIELD: tl.constexpr):
    """[BN, BK] float32, code - zero: each word is repeated for its fields, in place for its thread."""
    bit = tl.zeros_like(words)
    for i in tl.static_range(4):
        if FIELD << i < 32:
            words = tl.interleave(words, words)
            bit = tl.interleave(bit, bit + (16 >> i))
    return _integers(words, zero, magic, bit, FIELD)


@triton.jit
def _dot(w, x, y):
    """Y [BN, BM] + W [BN, BK] times [BM, BK]ᵀ."""
    if SIMULATED:
        w, x = w.to(tl.float32), x.to(tl.float32)
    return tl.dot(w, tl.trans(x), acc=y)


@triton.jit
def _head(x):
    """The first 8 bits of a float32: what bfloat16 holds, cut off, so that nothing overflows."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _product(w, x):
    """[BN, BK] integers times [BM, BK]ᵀ, summed in float32.

    The tensor cores multiply 16 bit values: a float32 is three of them, which hold all its bits.
    """
    y = tl.zeros([w.shape[0], x.shape[0]], tl.float32)
    if x.dtype == tl.float32:
        w = w.to(tl.bfloat16)
        high = _head(x)
        x = tl.where(x == high, 0.0, x - high)  # infinity has no rest
        middle = _head(x)
        y = _dot(w, (x - middle).to(tl.bfloat16), y)
        y = _dot(w, middle.to(tl.bfloat16), y)
        y = _dot(w, high.to(tl.bfloat16), y)
    else:
        y = _dot(w.to(x.dtype), x, y)
    return y


# One program for all M: a machine that serves sees every number of rows.
@triton.jit(do_not_specialize=["M", "tiles_per_group", "tiles_per_split", "magic"])
def tiles(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    groups_ptr,
    y_ptr,
    M,
    N,
    K,
    x_stride,
    tiles_per_group,
    tiles_per_split,
    magic,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    SCATTERED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Y [splits, M, N] = X [M, K] times the weight, each split over its share of the tiles along K.

    Computed as Yᵀ = Wᵀ Xᵀ: the 64 rows that a tensor core instruction wants are output channels, of
    which there are enough, and rows of X, of which there may be one, come in eights.

    A tile lies in one group, or SCATTERED: `groups_ptr` has the group of each input channel. Then the
    weights have their scales when they are multiplied, and 16 bits do not hold them: float32, in three
    parts.

    ZERO: the zero point that all groups have, or -1: uint8 [groups, N] in `zeros_ptr`.
    """
    FIELD: tl.constexpr = 4 if BITS == 3 else BITS
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K, BK))
    y = tl.zeros([BN, BM], tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        words = _words(words_ptr, tile, K, n, N, BITS, BK)
        k = tile * BK + tl.arange(0, BK)
        mask = (m < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
        if SCATTERED:
            group = tl.load(groups_ptr + k, mask=k < K, other=0)
            scale = _rows(scales_ptr, group, k < K, n, N).to(tl.float32)
        else:
            group = tile // tiles_per_group + tl.arange(0, 1)
            scale = _rows(scales_ptr, group, group >= 0, n, N).to(tl.float32)
        if ZERO >= 0:
            zero = tl.full([1, 1], ZERO, tl.float32)
        else:
            zero = _rows(zeros_ptr, group, group >= 0, n, N).to(tl.int32).to(tl.float32)
        w = _dequantized(words, zero, magic, FIELD)
        if SCATTERED:
            y = tl.dot(w * scale, tl.trans(x.to(tl.float32)), acc=y, input_precision="tf32x3")
        else:
            y += _product(w, x) * scale
    at = (split * M + m)[None, :] * N + n[:, None]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["size"])
def total(parts_ptr, y_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Y [size] = the sum of `parts` [SPLITS, size], in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        y += tl.load(parts_ptr + split * size + at, mask=at < size, other=0.0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < size)
