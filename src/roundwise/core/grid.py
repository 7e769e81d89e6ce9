"""Grids: the scale and zero point that a group of weights shares.

A grid maps code c to the value s·(c - z). Codes are 0 … maxq = 2^bits - 1, z is an integer, and s is
rounded to the float16 that will be stored *before* any weight is rounded to the grid, so what is
measured while quantizing is what a reader of the file gets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from roundwise.errors import NumericalError

#: Smallest and largest positive float16.
MIN_SCALE, MAX_SCALE = 2.0**-24, 65504.0


class Grid(NamedTuple):
    """Scale and zero point per row, both [rows], in the dtype of the weights they were made for."""

    scale: torch.Tensor
    zero: torch.Tensor


def round_to_float16(scale: torch.Tensor) -> torch.Tensor:
    """`scale` rounded to float16, never zero; same dtype as given.

    Raises:
        NumericalError: a scale is not finite or larger than float16 holds.
    """
    if not bool((scale <= MAX_SCALE).all()):
        raise NumericalError(f"a scale of {float(scale.max()):g} does not fit float16")
    return scale.clamp(min=MIN_SCALE).to(torch.float16).to(scale.dtype)


def minmax(W: torch.Tensor, maxq: int, *, sym: bool, min_zero: int = 0) -> Grid:
    """The published grid: the range of each row, zero included.

    Args:
        W: [rows, columns] of one group.
        maxq: largest code.
        sym: range -m … m with the zero point fixed at (maxq + 1) / 2.
        min_zero: smallest zero point allowed when asymmetric. A row without negative weights would
            take zero = 0; with `min_zero` 1 its scale is widened so that its maximum still fits.
    """
    low, high = W.amin(dim=1).clamp(max=0), W.amax(dim=1).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    empty = high == low
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = (high - low) / maxq
    if sym:
        return Grid(round_to_float16(scale), torch.full_like(scale, (maxq + 1) // 2))
    scale = torch.where((-low / scale).round() < min_zero, high / (maxq - min_zero), scale)
    scale = round_to_float16(scale)
    return Grid(scale, (-low / scale).round().clamp(min_zero, maxq))


def encode(t: torch.Tensor, grid: Grid, maxq: int) -> torch.Tensor:
    """Nearest codes (as floats) of `t` [..., rows] on `grid`."""
    return t.div(grid.scale).round_().add_(grid.zero).clamp_(0, maxq)


def decode(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Values of `codes` (floats, [..., rows])."""
    return codes.sub(grid.zero).mul_(grid.scale)
