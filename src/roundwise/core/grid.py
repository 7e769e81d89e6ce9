"""Grids: the scale and zero point that the weights of a group share.

A grid maps code c to the value s·(c - z). Codes are 0 … maxq = 2^bits - 1, z is an integer, and s is
rounded to the float16 that will be stored *before* any weight is rounded to the grid, so that the error
measured while quantizing is the error of the stored weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from roundwise.config import GridSearch
from roundwise.errors import NumericalError

#: Smallest and largest positive float16.
MIN_SCALE, MAX_SCALE = 2.0**-24, 65504.0


class Grid(NamedTuple):
    """Scale and zero point per row, both [rows], in the dtype of the weights they were made for.

    More axes may come first: [columns, rows], or [candidates, rows].
    """

    scale: torch.Tensor
    zero: torch.Tensor


@dataclass(frozen=True)
class GridSpec:
    """Rules that all grids of one weight follow, and how they are searched.

    Attributes:
        bits: width of a code.
        sym: the zero point is fixed at 2^(bits - 1); the range then has one more code below zero than
            above.
        min_zero: smallest zero point allowed if not `sym`.
        flip_sign: if `sym`, a search also tries negative scales, which have the extra code above zero.
        search: error that a search minimises: "mse", "pivot" (see `error_weights`); "minmax": no
            search, the grid spans the weights.
        keep: candidates per row that the solver rounds a group with, to keep the one of least loss.
    """

    bits: int
    sym: bool
    min_zero: int = 0
    flip_sign: bool = True
    search: GridSearch = "minmax"
    keep: int = 1

    @property
    def maxq(self) -> int:
        """Largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    def error_weights(self, D: torch.Tensor) -> torch.Tensor | None:
        """Returns the weight of a squared error in each column, [columns], as a search counts it.

        Args:
            D: [columns], pivots or the diagonal of H: what a squared error in a column costs.

        Returns:
            D for "pivot", ones for "mse", None for "minmax": no search.
        """
        if self.search == "minmax":
            return None
        return D if self.search == "pivot" else torch.ones_like(D)


def round_to_float16(scale: torch.Tensor) -> torch.Tensor:
    """Returns positive scales rounded to float16 and never zero, in the dtype given.

    Raises:
        NumericalError: a scale is not finite or larger than float16 holds.
    """
    if not bool((scale <= MAX_SCALE).all()):
        raise NumericalError(f"a scale of {float(scale.max()):g} does not fit float16")
    return scale.clamp(min=MIN_SCALE).to(torch.float16).to(scale.dtype)


def minmax(W: torch.Tensor, spec: GridSpec) -> Grid:
    """Returns the published grid: the range of each row, zero included.

    If `spec.sym`, the range is -m … m with m the largest absolute value of the row. If not, a row
    without negative weights would take zero = 0; with `spec.min_zero` 1 its scale is widened so that
    its maximum still fits.

    Args:
        W: [rows, columns] of one group.
        spec: `bits`, `sym` and `min_zero` are used.

    Raises:
        NumericalError: a scale does not fit float16.
    """
    maxq, min_zero = spec.maxq, spec.min_zero
    low, high = W.amin(dim=1).clamp(max=0), W.amax(dim=1).clamp(min=0)
    if spec.sym:
        high = torch.maximum(high, -low)
        low = -high
    empty = high == low
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = (high - low) / maxq
    if spec.sym:
        return Grid(round_to_float16(scale), torch.full_like(scale, (maxq + 1) // 2))
    scale = torch.where((-low / scale).round() < min_zero, high / (maxq - min_zero), scale)
    scale = round_to_float16(scale)
    return Grid(scale, (-low / scale).round().clamp(min_zero, maxq))


def encode(t: torch.Tensor, grid: Grid, maxq: int) -> torch.Tensor:
    """Returns the codes (as floats) of the grid points nearest to `t` [..., rows]."""
    return t.div(grid.scale).round_().add_(grid.zero).clamp_(0, maxq)


def decode(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Returns the values of `codes` (floats, [..., rows])."""
    return codes.sub(grid.zero).mul_(grid.scale)
