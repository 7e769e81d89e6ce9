"""Grid search: which scale and zero point cost a group least.

A min-max grid wastes codes on one outlier. The search tries narrower ranges as well and weighs each
error by the pivot D_j of its column: its cost once later columns have compensated for it. The solver
then rounds the group with the best few candidates and keeps the one whose true loss is least.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from roundwise.core.grid import Grid, GridSpec, decode, encode, round_to_float16

#: Ranges tried, as parts of the full one.
SHRINK = torch.linspace(1.0, 0.25, 60)


def score_grids(W: torch.Tensor, D: torch.Tensor, grids: Grid, maxq: int) -> torch.Tensor:
    """Returns what rounding to each candidate costs: Σ_j D_j (w_j - q_j)², [candidates, rows].

    Args:
        W: [columns, rows] of one group.
        D: [columns], weight of a squared error in each column.
        grids: scale and zero, each [candidates, rows].
        maxq: largest code.
    """
    scores = torch.empty_like(grids.scale)
    for score, grid in zip(scores, map(Grid, *grids), strict=True):
        error = decode(encode(W, grid, maxq), grid).sub_(W).square_()
        torch.mv(error.T, D, out=score)
    return scores


def best_grids(
    W: torch.Tensor,
    D: torch.Tensor,
    spec: GridSpec,
    score: Callable[[torch.Tensor, torch.Tensor, Grid, int], torch.Tensor] = score_grids,
) -> Grid:
    """Searches the `spec.keep` best grids of each row.

    Args:
        W: [columns, rows], the group's weights as updated by all finished columns.
        D: [columns], weight of a squared error in each column.
        spec: rules of the grids.
        score: `score_grids`, or a faster function that returns the same.

    Returns:
        Scale and zero, each [keep, rows], the best first; fewer if there are fewer candidates.

    Raises:
        NumericalError: a scale does not fit float16.
    """
    grids = candidates(W, spec)
    # Grids can be equal (all codes shifted by one): the one that was tried first wins.
    best = score(W, D, grids, spec.maxq).sort(dim=0, stable=True).indices[: spec.keep]
    return Grid(grids.scale.gather(0, best), grids.zero.gather(0, best))


def candidates(W: torch.Tensor, spec: GridSpec) -> Grid:
    """Returns all grids that a search tries, in order; scale and zero, each [candidates, rows].

    Args:
        W: [columns, rows] of one group.
        spec: rules of the grids.

    Raises:
        NumericalError: a scale does not fit float16.
    """
    maxq, min_zero = spec.maxq, spec.min_zero
    low, high = W.amin(dim=0).clamp(max=0), W.amax(dim=0).clamp(min=0)
    empty = high == low
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    shrink = SHRINK.to(W)[:, None]
    if spec.sym:
        below, above = (maxq + 1) // 2, maxq - (maxq + 1) // 2
        positive = torch.maximum(-low / below, high / above)
        negative = torch.maximum(high / below, -low / above)
        scales = [round_to_float16(positive * shrink), -round_to_float16(negative * shrink)]
        scale = torch.stack(scales if spec.flip_sign else scales[:1], dim=1)
        return Grid(scale.flatten(0, 1), torch.full_like(scale, below).flatten(0, 1))
    scale = round_to_float16((high - low) * (shrink / maxq))[:, None]
    # The zero point that puts the middle of the range in the middle of the codes, and others around
    # it; for 2 and 3 bits all zero points.
    middle = (maxq / 2 - (high + low) / (2 * scale)).round()
    offsets = range(min_zero, maxq + 1) if maxq < 8 else range(-2, 3)
    zero = torch.tensor([*offsets]).to(W)[None, :, None]
    zero = zero.expand(*scale.shape[:1], -1, scale.shape[2]) if maxq < 8 else middle + zero
    zero = zero.clamp(min_zero, maxq)
    return Grid(scale.expand_as(zero).flatten(0, 1), zero.flatten(0, 1))
