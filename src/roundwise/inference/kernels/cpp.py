"""The layout that the native kernel computes from, and the way back to the file's.

Codes lie in tiles of 64 output channels, [tile, word, 64]. A word holds neighbouring columns of one
channel, as in the file; only 3-bit codes, which straddle words there, come as two bits of 16 columns in
each of two words and the third bits of all 32 in a third:

    word 0   bits 2i, 2i + 1: low bits of column i            (i = 0 … 15)
    word 1   the same of column 16 + i
    word 2   third bits: of columns 0-3, 4-7, 16-19, 20-23 from bits 0, 1, 8, 9 on, every second bit,
             and of the column 8 after each, 16 bits above

A product takes pairs of columns at once: those that lie 16 bits apart in a word.

Columns are those of the file in turn, if each group is a run of them that fills whole words. Otherwise
(act-order, odd group sizes) they are sorted by group and padded; x is read in that order.

The CPU kernel: products with packed codes in C++, at the speed of memory (src/native/linear.cpp).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch

from roundwise.core.backends import cpp
from roundwise.core.quantized_weight import codes_per_block, pack, unpack
from roundwise.inference.kernels.base import PackedWeight

TILE = 64
#: Columns that share one scale of the activations, at most.
RUN = 128


class Columns(NamedTuple):
    """Which column of the file each column of the layout is."""

    source: torch.Tensor
    """int64 [columns]; `in_features` where there is none."""
    runs: torch.Tensor
    """int32 [runs, 2]: number of columns, and their group."""
    in_features: int
    in_turn: bool
    """The columns are those of the file, in turn."""


def columns_of(weight: PackedWeight) -> Columns:
    """The order in which the kernel passes through the columns."""
    unit, groups = codes_per_block(weight.bits), weight.channel_groups()
    counts = torch.bincount(groups, minlength=weight.groups)
    in_turn = bool((groups.diff() >= 0).all()) and not bool((counts % unit).any())
    source = torch.arange(weight.in_features)
    if not in_turn:
        padding = torch.full((unit,), weight.in_features)
        by_group = torch.split(torch.argsort(groups, stable=True), counts.tolist())
        source = torch.cat([torch.cat([c, padding[: -len(c) % unit]]) for c in by_group])
    runs = [
        (min(RUN, padded - start), group)
        for group, padded in enumerate((-(-counts // unit) * unit).tolist())
        for start in range(0, padded, RUN)
    ]
    return Columns(source, torch.tensor(runs, dtype=torch.int32), weight.in_features, in_turn)


def reading_order(columns: Columns, bits: int) -> torch.Tensor:
    """int32 [columns]: the activations that the halves of the pairs are multiplied with, in turn."""
    apart = 8 if bits == 3 else 16 // bits
    return columns.source.reshape(-1, 2, apart).mT.reshape(-1).to(torch.int32)


def to_tiles(weight: PackedWeight, columns: Columns) -> torch.Tensor:
    """int32 [tiles, words, 64]: the codes as the kernel reads them."""
    if columns.in_turn and weight.bits != 3:
        return tiled(weight.qweight)
    codes = unpack(weight.qweight, weight.bits)
    if not columns.in_turn:
        codes = torch.cat([codes, codes.new_zeros(1, codes.shape[1])])[columns.source]
    return tiled(_planes(codes) if weight.bits == 3 else pack(codes, weight.bits))


def from_tiles(tiles: torch.Tensor, out_features: int, columns: Columns, bits: int) -> torch.Tensor:
    """The inverse of `to_tiles`: qweight as the file has it."""
    words = flat(tiles, out_features)
    if columns.in_turn and bits != 3:
        return words
    codes = _from_planes(words) if bits == 3 else unpack(words, bits)
    if not columns.in_turn:
        real = columns.source < columns.in_features
        restored = torch.empty(columns.in_features, out_features, dtype=torch.uint8)
        restored[columns.source[real]] = codes[real]
        codes = restored
    return pack(codes, bits)


def tiled(rows: torch.Tensor) -> torch.Tensor:
    """[n, out] as [tiles, n, 64], zeros where the last tile is not full."""
    n, out_features = rows.shape
    tiles = -(-out_features // TILE)
    if tiles * TILE != out_features:
        rows = torch.nn.functional.pad(rows, (0, tiles * TILE - out_features))
    return rows.reshape(n, tiles, TILE).transpose(0, 1).contiguous()


def flat(tiles: torch.Tensor, out_features: int) -> torch.Tensor:
    """The inverse of `tiled`."""
    return tiles.transpose(0, 1).flatten(1)[:, :out_features].contiguous()


def _high_bit(column: int) -> int:
    """Where the third bit of one of 32 columns lies in the third word."""
    pair = column % 8
    return column // 16 * 8 + pair // 4 + pair % 4 * 2 + column % 16 // 8 * 16


def _planes(codes: torch.Tensor) -> torch.Tensor:
    """3-bit codes [columns, out] as words [3 · columns / 32, out]."""
    units = codes.reshape(-1, 32, codes.shape[1])
    words = torch.zeros(len(units), 3, codes.shape[1], dtype=torch.int32)
    for i in range(32):
        code = units[:, i].to(torch.int32)
        words[:, i // 16] |= (code & 3) << (2 * (i % 16))
        words[:, 2] |= (code >> 2) << _high_bit(i)
    return words.flatten(0, 1)


def _from_planes(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `_planes`."""
    units = words.reshape(-1, 3, words.shape[1])
    codes = torch.empty(len(units), 32, words.shape[1], dtype=torch.uint8)
    for i in range(32):
        low = units[:, i // 16] >> (2 * (i % 16)) & 3
        high = units[:, 2] >> _high_bit(i) & 1
        codes[:, i] = (low | high << 2).to(torch.uint8)
    return codes.flatten(0, 1)


#: As src/native/kernels.hpp numbers them.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class NativeKernel:
    """Every width, group size and order; x in float32, float16 or bfloat16.

    Activations are rounded to 16-bit integers, with a scale for each run of at most 128 columns of a
    group, and multiplied exactly: the result is within about 1e-4 of float64's, relative, and that of a
    row does not depend on the other rows nor on the number of threads.
    """

    name: ClassVar[str] = "native"

    def __init__(self, weight: PackedWeight) -> None:
        self.bits, self.zero_offset = weight.bits, weight.zero_offset
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.g_idx, self.scales_dtype = weight.g_idx, weight.scales.dtype
        self.columns = columns_of(weight)
        self.order = reading_order(self.columns, weight.bits)
        self.codes = to_tiles(weight, self.columns)
        scales = weight.scales
        # bfloat16 reaches further than float16: float32 holds it exactly.
        scales = scales if scales.dtype == torch.float16 else scales.to(torch.float32)
        self.scales = tiled(scales)
        zeros = weight.zeros()
        self.zero = int(zeros[0, 0])
        varied = bool((zeros != self.zero).any())
        self.zeros = tiled(zeros.to(torch.uint8)) if varied else None
        self._product: Any = None

    @classmethod
    def why_not(cls, weight: PackedWeight) -> str | None:
        """Elsewhere than on the CPU, and without the extension."""
        if weight.qweight.device.type != "cpu":
            return f"it computes on the CPU, not on {weight.qweight.device.type}"
        module, status = cpp.load()
        return f"the native extension is {status.reason}" if module is None else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in] -> [..., out]."""
        if torch.compiler.is_compiling():
            y: torch.Tensor = torch.ops.roundwise.native_linear(
                x, *self._tensors(), *self._numbers()
            )
            return y
        if self._product is None:
            self._product = _checked(self._tensors(), self._numbers())
        return _multiply(self._product, x, self.out_features)

    def _tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.codes, self.scales, self.zeros, self.order, self.columns.runs

    def _numbers(self) -> tuple[int, ...]:
        return self.bits, self.zero, self.in_features, self.out_features

    def __getstate__(self) -> dict[str, Any]:
        # Copies have tensors at other addresses.
        return {**self.__dict__, "_product": None}

    def packed(self) -> PackedWeight:
        """The weight it was made from."""
        groups = self.scales.shape[1]
        if self.zeros is None:
            zeros = torch.full((groups, self.out_features), self.zero, dtype=torch.int32)
        else:
            zeros = flat(self.zeros, self.out_features).to(torch.int32)
        stored = (zeros - self.zero_offset) & (2**self.bits - 1)
        return PackedWeight(
            from_tiles(self.codes, self.out_features, self.columns, self.bits),
            pack(stored.T, self.bits).T.contiguous(),
            flat(self.scales, self.out_features).to(self.scales_dtype),
            self.g_idx, self.bits, self.zero_offset,
        )  # fmt: skip


def _checked(tensors: tuple[Any, ...], numbers: tuple[int, ...]) -> Any:
    """The layer as the extension knows it: addresses, so the tensors must outlive it."""
    codes, scales, zeros, order, runs = tensors
    bits, zero, in_features, out_features = numbers
    module = cpp.load()[0]
    assert module is not None  # `why_not` said so
    return module.PackedLinear(
        in_features, out_features, bits, codes.view(-1), scales.view(torch.uint8).view(-1),
        scales.dtype == torch.float16,
        torch.empty(0, dtype=torch.uint8) if zeros is None else zeros.view(-1),
        zero, order, runs.view(-1), scales.shape[1],
    )  # fmt: skip


def _multiply(product: Any, x: torch.Tensor, out_features: int) -> torch.Tensor:
    x, shape = x.contiguous(), x.shape
    y = x.new_empty((*shape[:-1], out_features))
    product.multiply(
        x.data_ptr(), y.data_ptr(), math.prod(shape[:-1]), shape[-1], TYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _native_linear(x: torch.Tensor, *weight: Any) -> torch.Tensor:
    return _multiply(_checked(weight[:5], weight[5:]), x, weight[-1])


# For torch.compile, which cannot look into the extension: the same product as one operator.
LIBRARY = torch.library.Library("roundwise", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define(  # type: ignore[no-untyped-call]
    "native_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor order, Tensor runs, "
    "int bits, int zero, int in_features, int out_features) -> Tensor"
)
LIBRARY.impl("native_linear", _native_linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "roundwise::native_linear",
    lambda x, *weight: x.new_empty((*x.shape[:-1], weight[-1])),
    lib=LIBRARY,
)
