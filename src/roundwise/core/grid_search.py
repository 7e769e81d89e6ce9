"""Grid search: which scale and zero point cost a group least.

Min-max wastes codes on one outlier. Here narrower ranges are tried as well, each error weighed by the
pivot D_j of its column: what it really costs once later columns have made up for it. The best few are
handed to the solver, which rounds the group with each and keeps the one whose true loss is least.
"""

from __future__ import annotations

import torch

from roundwise.core.backends import triton
from roundwise.core.grid import Grid, decode, encode, round_to_float16

#: Ranges tried, as parts of the full one.
SHRINK = torch.linspace(1.0, 0.25, 60)


def best_grids(
    W: torch.Tensor,
    D: torch.Tensor,
    maxq: int,
    *,
    sym: bool,
    min_zero: int,
    keep: int,
    flip_sign: bool = True,
) -> Grid:
    """The `keep` best grids of each row, best first.

    Args:
        W: [columns, rows], the group's weights as updated by all finished columns.
        D: [columns], weight of a squared error in each column.
        maxq: largest code.
        sym: zero point fixed in the middle; the range then has one more code on one side.
        turned: where sym, negative scales are tried too, which have that code on the other side.
        min_zero: smallest zero point otherwise.
        keep: how many to return; fewer if there are fewer candidates.

    Returns:
        scale and zero, each [keep, rows].
    """
    grids = _candidates(W, maxq, sym=sym, min_zero=min_zero, flip_sign=flip_sign)
    scores = (triton.scores if triton.usable(W) else _scores)(W, D, grids, maxq)
    # Grids can be equal (all codes shifted by one): the one that was tried first wins.
    best = scores.sort(dim=0, stable=True).indices[:keep]
    return Grid(grids.scale.gather(0, best), grids.zero.gather(0, best))


def _scores(W: torch.Tensor, D: torch.Tensor, grids: Grid, maxq: int) -> torch.Tensor:
    """`gpu.scores` in plain torch."""
    found = torch.empty_like(grids.scale)
    for score, grid in zip(found, map(Grid, *grids), strict=True):
        error = decode(encode(W, grid, maxq), grid).sub_(W).square_()
        torch.mv(error.T, D, out=score)
    return found


def _candidates(W: torch.Tensor, maxq: int, *, sym: bool, min_zero: int, flip_sign: bool) -> Grid:
    """All that are tried, in order, scale and zero each [candidates, rows]."""
    low, high = W.amin(dim=0).clamp(max=0), W.amax(dim=0).clamp(min=0)
    empty = high == low
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    shrink = SHRINK.to(W)[:, None]
    if sym:
        below, above = (maxq + 1) // 2, maxq - (maxq + 1) // 2
        plain = torch.maximum(-low / below, high / above)
        other = torch.maximum(high / below, -low / above)
        tried = [round_to_float16(plain * shrink), -round_to_float16(other * shrink)]
        scale = torch.stack(tried if flip_sign else tried[:1], dim=1)
        return Grid(scale.flatten(0, 1), torch.full_like(scale, (maxq + 1) // 2).flatten(0, 1))
    scale = round_to_float16((high - low) * (shrink / maxq))[:, None]
    # The zero point that puts the middle of the range in the middle of the codes, and others around
    # it: all of them for the narrow widths.
    middle = (maxq / 2 - (high + low) / (2 * scale)).round()
    offsets = range(min_zero, maxq + 1) if maxq < 8 else range(-2, 3)
    zero = torch.tensor([*offsets]).to(W)[None, :, None]
    zero = zero.expand(*scale.shape[:1], -1, scale.shape[2]) if maxq < 8 else middle + zero
    zero = zero.clamp(min_zero, maxq)
    return Grid(scale.expand_as(zero).flatten(0, 1), zero.flatten(0, 1))
