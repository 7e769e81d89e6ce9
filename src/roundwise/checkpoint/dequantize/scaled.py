"""Weights that the files hold as small numbers with a scale for each block: FP8, FP4 and INT8.

A weight [..., out, in] has scales [..., ⌈out/r⌉, ⌈in/c⌉] for blocks of r x c numbers. A block is the
whole weight, a row, a part of a row (16 numbers in NVFP4, 32 in MXFP4 and MXFP8) or a tile (128 x 128
in DeepSeek-V3). Scales are floating point numbers, or single bytes e that stand for 2^(e - 127) (E8M0).
A few rows are computed at a time, in float32, and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from roundwise.checkpoint.reader import TensorInfo
from roundwise.checkpoint.transformed_view import CHUNK_NUMEL, ComputedInfo
from roundwise.errors import CheckpointError

#: FP8 is one byte (E4M3 or E5M2); FP4 is half a byte (E2M1), the lower half first; INT8 is one byte.
Kind = Literal["FP8", "FP4", "INT8"]
#: The numbers that the codes 0 … 15 of FP4 stand for: a sign, two bits of exponent, one of mantissa.
FP4_VALUES = tuple(
    sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
)
#: Types of scales that are exponents of 2, and what is subtracted from them.
EXPONENTS, EXPONENT_BIAS = ("U8", "F8_E8M0"), 127
#: Types of scales, and of a factor for the whole weight.
FLOATS = ("F32", "BF16", "F16", "F8_E4M3")


@dataclass(frozen=True)
class ScaledWeight:
    """A weight as the files hold it; its tensors have been checked against each other."""

    kind: Kind
    codes: TensorInfo
    """[..., out, in]; two FP4 numbers in one byte."""
    scales: TensorInfo
    """[..., ⌈out/r⌉, ⌈in/c⌉]."""
    block: tuple[int, int]
    """(r, c), the numbers that share a scale."""
    dtype: torch.dtype
    """Type of the dense weight."""
    zeros: TensorInfo | None = None
    """Zero points, in the shape of the scales."""
    factor: TensorInfo | None = None
    """One number for the whole weight, beside the scales."""
    divides: bool = False
    """The scales are divided by `factor` instead of multiplied."""
    transposed: bool = False
    """The model has this weight as [..., in, out]."""
    first_row: int = 0
    """Row of the whole weight that the first row of `codes` is."""

    @property
    def columns(self) -> int:
        """Number of input channels."""
        return self.codes.shape[-1] * (2 if self.kind == "FP4" else 1)

    @property
    def format(self) -> str:
        """Usual name of the format."""
        if self.scales.dtype in EXPONENTS and self.block == (1, 32):
            return f"MX{self.kind}"
        return "NVFP4" if self.kind == "FP4" and self.block == (1, 16) else self.kind

    def dense(self) -> ComputedInfo:
        """Returns the dense weight, which is computed when it is read."""
        *leading, rows = self.codes.shape[:-1]
        matrix = (self.columns, rows) if self.transposed else (rows, self.columns)
        return ComputedInfo.from_source(
            self.codes, (*leading, *matrix), self.dtype, self._compute,
            select_rows=None if self.transposed and not leading else self._rows,
            stored_as=self.format,
        )  # fmt: skip

    def _rows(self, start: int, count: int) -> ComputedInfo:
        """Returns some of the matrices of a stack, or some rows of a matrix."""
        codes = self.codes.rows(start, count)
        if len(codes.shape) == 2:
            return replace(self, codes=codes, first_row=self.first_row + start).dense()

        def part(info: TensorInfo) -> TensorInfo:  # a single value is for all of them
            return info.rows(start, count) if info.shape[0] > 1 else info

        zeros = None if self.zeros is None else part(self.zeros)
        return replace(self, codes=codes, scales=part(self.scales), zeros=zeros).dense()

    def _compute(self) -> torch.Tensor:
        *leading, rows, width = self.codes.shape
        dense = torch.empty((math.prod(leading), rows, self.columns), dtype=self.dtype)
        codes = self.codes.read().reshape(-1, rows, width)
        scales = (
            self._scales().expand(*leading, -1, -1).reshape(len(dense), *self.scales.shape[-2:])
        )
        zeros = None
        if self.zeros is not None:
            zeros = (
                self.zeros.read().to(torch.float32).expand(*leading, -1, -1).reshape(scales.shape)
            )
        step = max(1, CHUNK_NUMEL // self.columns)
        for index, matrix in enumerate(dense):
            for start in range(0, rows, step):
                part = slice(start, start + step)
                values = _numbers(codes[index, part], self.kind)
                if zeros is not None:
                    values -= self._spread(zeros[index], part, rows)
                matrix[part] = values.mul_(self._spread(scales[index], part, rows))
        dense = dense.mT if self.transposed else dense
        return dense.reshape(*leading, *dense.shape[1:])

    def _scales(self) -> torch.Tensor:
        """Returns the scales, with the factor of the whole weight, in float32."""
        scales = self.scales.read()
        if self.scales.dtype in EXPONENTS:
            scales = (scales.view(torch.uint8).to(torch.float32) - EXPONENT_BIAS).exp2()
        scales = scales.to(torch.float32)
        if self.factor is not None:
            factor = self.factor.read().to(torch.float32).reshape(())
            scales = scales / factor if self.divides else scales * factor
        return scales

    def _spread(self, grid: torch.Tensor, part: slice, rows: int) -> torch.Tensor:
        """Returns the value of a grid of blocks at each number of some rows."""
        indices = torch.arange(part.start, min(part.stop, rows)) + self.first_row
        lines = grid[torch.div(indices, self.block[0], rounding_mode="floor")]
        if lines.shape[1] == 1:
            return lines
        return lines.repeat_interleave(self.block[1], dim=1)[:, : self.columns]


def _numbers(codes: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Returns the numbers that codes [rows, …] stand for, in float32, without scales."""
    if kind != "FP4":
        return codes.to(torch.float32)
    table, pairs = torch.tensor(FP4_VALUES), codes.view(torch.uint8)
    halves = torch.stack((pairs & 15, pairs >> 4), dim=-1)
    return table[halves.flatten(1).int()]


def scaled_weight(
    name: str,
    kind: Kind,
    codes: TensorInfo,
    scales: TensorInfo,
    dtype: torch.dtype,
    *,
    blocks: Iterable[tuple[int, int]] = (),
    zeros: TensorInfo | None = None,
    factor: TensorInfo | None = None,
    divides: bool = False,
    transposed: bool = False,
) -> ScaledWeight:
    """Returns the record of a weight, after a check that its tensors fit together.

    Args:
        name: name of the weight, for error messages.
        kind, codes, scales, dtype, zeros, factor, divides, transposed: see `ScaledWeight`.
        blocks: sizes of a block according to the config; sizes that all formats know need not be there.

    Raises:
        CheckpointError: types or shapes contradict each other or the config.
    """
    if len(codes.shape) < 2 or 0 in codes.shape:
        raise CheckpointError(f"{name} holds {kind} numbers, but is not a matrix")
    for what, info, allowed in (
        ("scales", scales, (*FLOATS, *EXPONENTS)), ("zero points", zeros, ("I8", "U8", *FLOATS)),
        ("a factor", factor, FLOATS),
    ):  # fmt: skip
        if info is not None and info.dtype not in allowed:
            raise CheckpointError(f"{name} has {what} of type {info.dtype}, which no format has")
    if factor is not None and math.prod(factor.shape) != 1:
        raise CheckpointError(f"{name} has {math.prod(factor.shape)} factors instead of one")
    scales = _as_grid(codes, scales)
    zeros = None if zeros is None else _as_grid(codes, zeros)
    if zeros is not None and zeros.shape != scales.shape:
        raise CheckpointError(
            f"{name} has zero points {list(zeros.shape)} for scales {list(scales.shape)}"
        )
    weight = ScaledWeight(kind, codes, scales, (1, 1), dtype, zeros, factor, divides, transposed)
    sizes = (codes.shape[-2], weight.columns)
    return replace(weight, block=_block(name, sizes, codes.shape[:-2], scales.shape, [*blocks]))


def _as_grid(codes: TensorInfo, scales: TensorInfo) -> TensorInfo:
    """Returns scales with as many axes as the codes: one value, or one for each row, has fewer."""
    shape, count = scales.shape, len(codes.shape)
    if math.prod(shape) == 1:
        shape = (1,) * count
    elif len(shape) < count and shape == codes.shape[: len(shape)]:
        shape = (*shape, *(1,) * (count - len(shape)))
    return replace(scales, shape=shape)


def _block(
    name: str,
    sizes: tuple[int, int],
    leading: tuple[int, ...],
    grid: tuple[int, ...],
    stated: list[tuple[int, int]],
) -> tuple[int, int]:
    """Returns the size of a block of a weight [*leading, *sizes] with this grid of scales."""
    usual = [(1, 32), (1, 16), (1, sizes[1]), sizes]
    for block in (*stated, *usual):
        expected = tuple(-(-size // b) for size, b in zip(sizes, block, strict=True))
        if grid[-2:] == expected and grid[:-2] in (leading, (1,) * len(leading)):
            return block
    if stated:
        expected = tuple(-(-size // b) for size, b in zip(sizes, stated[0], strict=True))
        raise CheckpointError(
            f"the scales of {name} have shape {list(grid)}; blocks of {stated[0][0]} x {stated[0][1]} "
            f"require {list(leading + expected)}"
        )
    if len(grid) == len(leading) + 2 and not any(
        s % n for s, n in zip(sizes, grid[-2:], strict=True)
    ):
        return sizes[0] // grid[-2], sizes[1] // grid[-1]  # the config does not say: equal blocks
    raise CheckpointError(
        f"the scales of {name} have shape {list(grid)}, which does not divide {list(sizes)} numbers "
        "into equal blocks, and the quantization config names no block size"
    )
