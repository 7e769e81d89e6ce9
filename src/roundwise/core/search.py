"""Grid search: which scale and zero point cost a group least.

Min-max wastes codes on one outlier. Here narrower ranges are tried as well, each error weighed by the
pivot D_j of its column: what it really costs once later columns have made up for it. The best few are
handed to the solver, which rounds the group with each and keeps the one whose true loss is least.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from roundwise.core.grid import Grid, decode, encode, storable

#: Ranges tried, as parts of the full one.
SHRINK = torch.linspace(1.0, 0.25, 60)


def best_grids(
    W: torch.Tensor, D: torch.Tensor, maxq: int, *, sym: bool, min_zero: int, keep: int
) -> Grid:
    """The `keep` best grids of each row, best first.

    Args:
        W: [columns, rows], the group's weights as updated by all finished columns.
        D: [columns], weight of a squared error in each column.
        maxq: largest code.
        sym: zero point fixed in the middle; the range then has one more code on one side, and a
            negative scale turns that side around.
        min_zero: smallest zero point otherwise.
        keep: how many to return; fewer if there are fewer candidates.

    Returns:
        scale and zero, each [keep, rows].
    """
    scores, scales, zeros = [], [], []
    for grid in _candidates(W, maxq, sym=sym, min_zero=min_zero):
        error = decode(encode(W, grid, maxq), grid).sub_(W).square_()
        scores.append(D @ error)
        scales.append(grid.scale)
        zeros.append(grid.zero)
    # Grids can be equal (all codes shifted by one): the one that was tried first wins.
    best = torch.stack(scores).sort(dim=0, stable=True).indices[:keep]
    return Grid(torch.stack(scales).gather(0, best), torch.stack(zeros).gather(0, best))


def _candidates(W: torch.Tensor, maxq: int, *, sym: bool, min_zero: int) -> Iterator[Grid]:
    low, high = W.amin(dim=0).clamp(max=0), W.amax(dim=0).clamp(min=0)
    empty = high == low
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    shrink = SHRINK.to(W.dtype).tolist()
    if sym:
        zero = torch.full_like(low, (maxq + 1) // 2)
        below, above = (maxq + 1) // 2, maxq - (maxq + 1) // 2
        plain = torch.maximum(-low / below, high / above)
        turned = torch.maximum(high / below, -low / above)
        for part in shrink:
            yield Grid(storable(plain * part), zero)
            yield Grid(-storable(turned * part), zero)
        return
    for part in shrink:
        scale = storable((high - low) * (part / maxq))
        # The zero point that puts the middle of the range in the middle of the codes, and others
        # around it: all of them for the narrow widths.
        middle = (maxq / 2 - (high + low) / (2 * scale)).round()
        offsets = range(min_zero, maxq + 1) if maxq < 8 else range(-2, 3)
        for offset in offsets:
            zero = torch.full_like(low, offset) if maxq < 8 else middle + offset
            yield Grid(scale, zero.clamp(min_zero, maxq))
