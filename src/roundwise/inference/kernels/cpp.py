"""CPU kernel: multiplies with packed codes in C++, limited by memory bandwidth (src/native/linear.cpp).

The kernel keeps the codes in a layout of its own; `packed()` converts them back to the layout of the
file. "Columns" are columns of W, that is input channels.

Order of columns (`ColumnLayout`). Columns stay in the order of the file if every group consists of
neighbouring columns and fills whole words. Otherwise (act-order, odd group sizes) columns are sorted by
group, and each group is padded to whole words with columns of code 0; the kernel reads x in that order.

Words. An int32 word has the codes of neighbouring columns of one output channel, as in the file. Codes
of 5, 6 and 7 bits are widened to 8. 3-bit codes would straddle words: 32 columns take three words:

    word 0   two low bits of columns 0 … 15, column i at bits 2i and 2i + 1
    word 1   two low bits of columns 16 … 31, likewise
    word 2   high bits: columns 0-3 at bits 0, 2, 4, 6, columns 4-7 at bits 1, 3, 5, 7;
             columns 16-23 likewise 8 bits higher; the column 8 after any of these 16 bits above it

Pairs. One instruction multiplies two codes that are 16 bits apart in a word with two activations, so
activations are in the order of the pairs (`activation_order`): for 4 bits 0, 4, 1, 5, 2, 6, 3, 7.

Tiles. Words are stored as [tiles, words, 64], a tile for every 64 output channels, so that a thread
reads memory sequentially. Scales and zero points are tiled in the same way.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch

from roundwise.core.backends import cpp
from roundwise.core.quantized_weight import codes_per_block, pack, unpack
from roundwise.inference.kernels.base import PackedWeight, kernel_width

#: Output channels of a tile.
TILE = 64
#: Most columns that share one scale of the activations.
MAX_RUN = 128
#: Numbers of the dtypes in the extension (`Type` in src/native/kernels.hpp).
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class ColumnLayout(NamedTuple):
    """Order of the columns in the kernel's layout, and their groups."""

    file_columns: torch.Tensor
    """int64 [columns]: number of each column in the file; `in_features` for padding."""
    runs: torch.Tensor
    """int32 [runs, 2]: number of columns, and group. A run is up to `MAX_RUN` columns of one group; they
    share a scale of the activations."""
    in_features: int
    is_file_order: bool
    """True if columns are in the order of the file, without padding."""


def column_layout(weight: PackedWeight) -> ColumnLayout:
    """Returns the order of columns that the kernel needs for a weight."""
    block, groups = codes_per_block(kernel_width(weight.bits)), weight.channel_groups()
    sizes = torch.bincount(groups, minlength=weight.groups)
    is_file_order = bool((groups.diff() >= 0).all()) and not bool((sizes % block).any())
    file_columns = torch.arange(weight.in_features)
    if not is_file_order:
        padding = torch.full((block,), weight.in_features)
        by_group = torch.split(torch.argsort(groups, stable=True), sizes.tolist())
        file_columns = torch.cat([torch.cat([c, padding[: -len(c) % block]]) for c in by_group])
    runs = [
        (min(MAX_RUN, size - start), group)
        for group, size in enumerate((-(-sizes // block) * block).tolist())
        for start in range(0, size, MAX_RUN)
    ]
    return ColumnLayout(
        file_columns, torch.tensor(runs, dtype=torch.int32), weight.in_features, is_file_order
    )


def activation_order(layout: ColumnLayout, bits: int) -> torch.Tensor:
    """Returns the order in which the kernel reads x, by pairs of codes.

    Args:
        layout: order of columns.
        bits: width of the codes in the kernel: 2, 3, 4 or 8.

    Returns:
        int32 [columns]: column of the file for each activation; `in_features` for padding.
    """
    distance = 8 if bits == 3 else 16 // bits  # columns between the two codes of a pair
    return layout.file_columns.reshape(-1, 2, distance).mT.reshape(-1).to(torch.int32)


def pack_tiles(weight: PackedWeight, layout: ColumnLayout) -> torch.Tensor:
    """Converts codes from the layout of the file to that of the kernel.

    Args:
        weight: packed weight in the layout of the file.
        layout: order of columns.

    Returns:
        int32 [tiles, words, 64].
    """
    width = kernel_width(weight.bits)
    if layout.is_file_order and width == weight.bits != 3:
        return split_into_tiles(weight.qweight)
    codes = unpack(weight.qweight, weight.bits)
    if not layout.is_file_order:
        zero_row = codes.new_zeros(1, codes.shape[1])  # padding: row number in_features
        codes = torch.cat([codes, zero_row])[layout.file_columns]
    return split_into_tiles(_pack_3_bits(codes) if width == 3 else pack(codes, width))


def unpack_tiles(
    tiles: torch.Tensor, out_features: int, layout: ColumnLayout, bits: int
) -> torch.Tensor:
    """Converts codes from the layout of the kernel to that of the file: the inverse of `pack_tiles`.

    Args:
        tiles: int32 [tiles, words, 64].
        out_features: number of output channels; the rest of the last tile is padding.
        layout: order of columns.
        bits: width of the codes in the file.

    Returns:
        qweight, int32 [in·bits/32, out].
    """
    words, width = join_tiles(tiles, out_features), kernel_width(bits)
    if layout.is_file_order and width == bits != 3:
        return words
    codes = _unpack_3_bits(words) if width == 3 else unpack(words, width)
    if not layout.is_file_order:
        not_padding = layout.file_columns < layout.in_features
        in_file_order = torch.empty(layout.in_features, out_features, dtype=torch.uint8)
        in_file_order[layout.file_columns[not_padding]] = codes[not_padding]
        codes = in_file_order
    return pack(codes, bits)


def split_into_tiles(rows: torch.Tensor) -> torch.Tensor:
    """Splits [n, out] into tiles [tiles, n, 64] of output channels; pads the last one with zeros."""
    n, out_features = rows.shape
    tiles = -(-out_features // TILE)
    if tiles * TILE != out_features:
        rows = torch.nn.functional.pad(rows, (0, tiles * TILE - out_features))
    return rows.reshape(n, tiles, TILE).transpose(0, 1).contiguous()


def join_tiles(tiles: torch.Tensor, out_features: int) -> torch.Tensor:
    """Joins tiles [tiles, n, 64] to [n, out]: the inverse of `split_into_tiles`."""
    return tiles.transpose(0, 1).flatten(1)[:, :out_features].contiguous()


def _high_bit_position(column: int) -> int:
    """Returns the bit of word 2 for the high bit of one of 32 columns (see the module docstring)."""
    pair = column % 8
    return column // 16 * 8 + pair // 4 + pair % 4 * 2 + column % 16 // 8 * 16


def _pack_3_bits(codes: torch.Tensor) -> torch.Tensor:
    """Packs 3-bit codes [columns, out] into three words per 32 columns, [3 · columns / 32, out]."""
    blocks = codes.reshape(-1, 32, codes.shape[1])
    words = torch.zeros(len(blocks), 3, codes.shape[1], dtype=torch.int32)
    for i in range(32):
        code = blocks[:, i].to(torch.int32)
        words[:, i // 16] |= (code & 3) << (2 * (i % 16))
        words[:, 2] |= (code >> 2) << _high_bit_position(i)
    return words.flatten(0, 1)


def _unpack_3_bits(words: torch.Tensor) -> torch.Tensor:
    """Unpacks words [3 · columns / 32, out] to codes [columns, out]: the inverse of `_pack_3_bits`."""
    blocks = words.reshape(-1, 3, words.shape[1])
    codes = torch.empty(len(blocks), 32, words.shape[1], dtype=torch.uint8)
    for i in range(32):
        low = blocks[:, i // 16] >> (2 * (i % 16)) & 3
        high = blocks[:, 2] >> _high_bit_position(i) & 1
        codes[:, i] = (low | high << 2).to(torch.uint8)
    return codes.flatten(0, 1)


class NativeKernel:
    """C++ kernel for every width, group size and column order; x in float32, float16 or bfloat16.

    Activations are rounded to 16-bit integers, with one scale for each run of at most 128 columns of a
    group; products of integers are exact. The result is within about 1e-4 of float64's, relative. The
    result of a row depends neither on the other rows nor on the number of threads.
    """

    name: ClassVar[str] = "native"

    def __init__(self, weight: PackedWeight) -> None:
        self.bits, self.zero_offset = weight.bits, weight.zero_offset
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.g_idx, self.scales_dtype = weight.g_idx, weight.scales.dtype
        self.layout = column_layout(weight)
        self.order = activation_order(self.layout, kernel_width(weight.bits))
        self.codes = pack_tiles(weight, self.layout)
        scales = weight.scales
        # bfloat16 has a wider range than float16; float32 holds it exactly.
        scales = scales if scales.dtype == torch.float16 else scales.to(torch.float32)
        self.scales = split_into_tiles(scales)
        zeros = weight.zeros()
        # One number if all zero points are equal, as in symmetric checkpoints; otherwise also a tensor.
        self.zero = int(zeros[0, 0])
        all_equal = bool((zeros == self.zero).all())
        self.zeros = None if all_equal else split_into_tiles(zeros.to(torch.uint8))
        self._packed_linear: Any = None

    @classmethod
    def unsupported_reason(cls, weight: PackedWeight) -> str | None:
        """Returns a reason for weights that are not on the CPU, and if the extension is missing."""
        if weight.qweight.device.type != "cpu":
            return f"it computes on the CPU, not on {weight.qweight.device.type}"
        module, status = cpp.load()
        return f"the native extension is {status.reason}" if module is None else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies x [..., in] with the weight; returns [..., out]."""
        if torch.compiler.is_compiling():
            y: torch.Tensor = torch.ops.roundwise.native_linear(
                x, *self.operator_tensors(), *self.operator_integers()
            )
            return y
        if self._packed_linear is None:
            self._packed_linear = _make_packed_linear(
                self.operator_tensors(), self.operator_integers()
            )
        return _multiply(self._packed_linear, x, self.out_features)

    def operator_tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Returns the tensor arguments of `torch.ops.roundwise.native_linear` after x."""
        return self.codes, self.scales, self.zeros, self.order, self.layout.runs

    def operator_integers(self) -> tuple[int, ...]:
        """Returns the integer arguments of `torch.ops.roundwise.native_linear`."""
        return kernel_width(self.bits), self.zero, self.in_features, self.out_features

    def __getstate__(self) -> dict[str, Any]:
        # `_packed_linear` has the addresses of tensors, which are different ones in a copy.
        return {**self.__dict__, "_packed_linear": None}

    def packed(self) -> PackedWeight:
        """Returns the weight it was made from."""
        groups = self.scales.shape[1]
        if self.zeros is None:
            zeros = torch.full((groups, self.out_features), self.zero, dtype=torch.int32)
        else:
            zeros = join_tiles(self.zeros, self.out_features).to(torch.int32)
        stored = (zeros - self.zero_offset) & (2**self.bits - 1)
        return PackedWeight(
            qweight=unpack_tiles(self.codes, self.out_features, self.layout, self.bits),
            qzeros=pack(stored.T, self.bits).T.contiguous(),
            scales=join_tiles(self.scales, self.out_features).to(self.scales_dtype),
            g_idx=self.g_idx,
            bits=self.bits,
            zero_offset=self.zero_offset,
        )


def _make_packed_linear(tensors: tuple[Any, ...], integers: tuple[int, ...]) -> Any:
    """Creates the extension's `PackedLinear`, which checks its arguments.

    It keeps only the addresses of the tensors, so the tensors must outlive it.
    """
    codes, scales, zeros, order, runs = tensors
    bits, zero, in_features, out_features = integers
    module = cpp.load()[0]
    assert module is not None  # checked by `unsupported_reason`
    return module.PackedLinear(
        in_features, out_features, bits, codes.view(-1), scales.view(torch.uint8).view(-1),
        scales.dtype == torch.float16,
        torch.empty(0, dtype=torch.uint8) if zeros is None else zeros.view(-1),
        zero, order, runs.view(-1), scales.shape[1],
    )  # fmt: skip


def _multiply(packed_linear: Any, x: torch.Tensor, out_features: int) -> torch.Tensor:
    x, shape = x.contiguous(), x.shape
    y = x.new_empty((*shape[:-1], out_features))
    packed_linear.multiply(
        x.data_ptr(), y.data_ptr(), math.prod(shape[:-1]), shape[-1], DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _native_linear(x: torch.Tensor, *weight: Any) -> torch.Tensor:
    return _multiply(_make_packed_linear(weight[:5], weight[5:]), x, weight[-1])


# torch.compile cannot trace into the extension: for it, the product is a custom operator.
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
