"""Triton programs: multiply with packed weights on a GPU and dequantize them on the way.

They work with pointers, sizes and the layout of the words, and know nothing of layers or of when they
are used (see triton.py). This file needs the package triton and is imported at the first product.

A code is converted to a number without a conversion instruction, of which GPUs execute few per cycle.
Its bits are masked where they are in the word, at position p, and become mantissa bits of the float32
2^23; one multiply-add does the rest, exactly:

    word & (15 << p) | bits of 2^23     2^23 + code·2^p      as float32; p + 4 <= 23
    · 2^-p - (2^(23-p) + zero)          code - zero

These integers are exact in bfloat16 and float16 too, so tensor cores multiply exact values; the scale
of a group is applied to its float32 sum. No dtype loses accuracy, except by rounding of the input and
output.

3-bit words (layout: see triton.py) are joined to words of eight 4-bit fields first.
"""

import triton
import triton.language as tl

#: Triton's interpreter multiplies the bits of bfloat16 as integers: there, values are float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _decode(word, zero, magic, bit, FIELD: tl.constexpr):
    """Computes code - zero, float32, for the field of FIELD bits that starts at `bit` of `word`.

    `magic` has the bits of 2^23. It is an argument of the programs because a constant would cost one
    more instruction per code: an instruction can have only one immediate operand.
    """
    shift = tl.where(bit + FIELD > 23, 16, 0)
    position = bit - shift
    field = (word >> shift) & (((1 << FIELD) - 1) << position)
    value = (field | magic).to(tl.float32, bitcast=True)
    unit = ((127 - position) << 23).to(tl.float32, bitcast=True)
    return value * unit - (zero + ((150 - position) << 23).to(tl.float32, bitcast=True))


@triton.jit
def _load_rows(pointer, rows, valid, n, N):
    """Loads rows of a matrix [..., N] as columns, [BN, rows]; 0 where `valid` [rows] is False."""
    mask = (n < N)[:, None] & valid[None, :]
    return tl.load(pointer + rows[None, :] * N + n[:, None], mask=mask, other=0)


@triton.jit
def _load_words(words_ptr, tile, K, n, N, BITS: tl.constexpr, BK: tl.constexpr):
    """Loads the words of a tile of BK input channels, [BN, BK·FIELD/32]; 3-bit codes in 4-bit fields."""
    if BITS == 3:
        # Per 32 codes: two words of low bits, one of high bits.
        block = tile * (BK // 32) + tl.arange(0, BK // 32)
        half = tile * (BK // 16) + tl.arange(0, BK // 16)
        low = _load_rows(words_ptr, half + half // 2, half * 16 < K, n, N)
        high = _load_rows(words_ptr, 3 * block + 2, block * 32 < K, n, N)
        low = tl.interleave(low, low >> 2) & 0x33333333
        high = tl.interleave(high, high >> 2)
        high = tl.interleave(high, high >> 1) & 0x11111111
        return low | (high << 2)
    else:
        row = tile * (BK * BITS // 32) + tl.arange(0, BK * BITS // 32)
        return _load_rows(words_ptr, row, row * (32 // BITS) < K, n, N)


@triton.jit
def _dequantize(words, zero, magic, FIELD: tl.constexpr):
    """Computes code - zero, float32 [BN, BK]: repeats each word for its fields, within its thread."""
    bit = tl.zeros_like(words)
    for i in tl.static_range(4):
        if FIELD << i < 32:
            words = tl.interleave(words, words)
            bit = tl.interleave(bit, bit + (16 >> i))
    return _decode(words, zero, magic, bit, FIELD)


@triton.jit
def _dot(w, x, y):
    """Adds a product to y: y [BN, BM] + w [BN, BK] · x [BM, BK]ᵀ."""
    if INTERPRETED:
        w, x = w.to(tl.float32), x.to(tl.float32)
    return tl.dot(w, tl.trans(x), acc=y)


@triton.jit
def _truncate_to_bfloat16(x):
    """Truncates a float32 to the 8 leading bits that bfloat16 has; rounding could overflow."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _integer_product(w, x):
    """Computes w [BN, BK] (integers) · x [BM, BK]ᵀ with float32 sums.

    Tensor cores multiply 16-bit values, so a float32 x is split into three bfloat16 parts, which
    together have all its bits.
    """
    y = tl.zeros([w.shape[0], x.shape[0]], tl.float32)
    if x.dtype == tl.float32:
        w = w.to(tl.bfloat16)
        high = _truncate_to_bfloat16(x)
        x = tl.where(x == high, 0.0, x - high)  # for infinity, the rest is 0
        middle = _truncate_to_bfloat16(x)
        y = _dot(w, (x - middle).to(tl.bfloat16), y)
        y = _dot(w, middle.to(tl.bfloat16), y)
        y = _dot(w, high.to(tl.bfloat16), y)
    else:
        y = _dot(w.to(x.dtype), x, y)
    return y


# One program for all M: a server sees every number of rows.
@triton.jit(do_not_specialize=["M", "tiles_per_group", "tiles_per_split", "magic"])
def matmul_tiles(
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
    """Computes Y [splits, M, N] = X [M, K] · W, each split over its share of the tiles along K.

    Computed as Yᵀ = Wᵀ Xᵀ: a tensor core instruction has 64 rows, which are output channels here, as
    there are always enough of them; rows of X, of which there may be only one, come in eights.

    SCATTERED: False: a tile lies within one group. True: `groups_ptr` has the group of each input
    channel, so weights are scaled before they are multiplied. 16 bits cannot represent scaled weights
    exactly, so they are multiplied as float32, in three parts.

    ZERO: the zero point of all groups, or -1: zero points are in `zeros_ptr`, uint8 [groups, N].
    """
    FIELD: tl.constexpr = 4 if BITS == 3 else BITS
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K, BK))
    y = tl.zeros([BN, BM], tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        words = _load_words(words_ptr, tile, K, n, N, BITS, BK)
        k = tile * BK + tl.arange(0, BK)
        mask = (m < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
        if SCATTERED:
            group = tl.load(groups_ptr + k, mask=k < K, other=0)
            scale = _load_rows(scales_ptr, group, k < K, n, N).to(tl.float32)
        else:
            group = tile // tiles_per_group + tl.arange(0, 1)
            scale = _load_rows(scales_ptr, group, group >= 0, n, N).to(tl.float32)
        if ZERO >= 0:
            zero = tl.full([1, 1], ZERO, tl.float32)
        else:
            zero = _load_rows(zeros_ptr, group, group >= 0, n, N).to(tl.int32).to(tl.float32)
        w = _dequantize(words, zero, magic, FIELD)
        if SCATTERED:
            y = tl.dot(w * scale, tl.trans(x.to(tl.float32)), acc=y, input_precision="tf32x3")
        else:
            y += _integer_product(w, x) * scale
    offset = (split * M + m)[None, :] * N + n[:, None]
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["size"])
def sum_splits(parts_ptr, y_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Computes Y [size] as the sum of `parts` [SPLITS, size], always in the same order."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        y += tl.load(parts_ptr + split * size + offset, mask=offset < size, other=0.0)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=offset < size)
