"""The inner loops of the solver, column by column: rounding a group, descent and exchange on a panel.

All matrices here are [columns, rows of the weight], so that one column of the weight is contiguous. On
the CPU the native extension does the same much faster (`core/native.py`).
"""

from __future__ import annotations

import torch

from roundwise.core.backends import cpp, triton
from roundwise.core.grid import Grid, decode, encode, minmax
from roundwise.core.grid_search import SHRINK, best_grids

#: Columns between two matrix products with the errors before them.
PANEL = 128
#: Columns of an exchange: which of them answer to a move.
WINDOW = 1024
#: How far from its best value, in steps, a column must be for its second best code to be tried:
#: where it is nearer, the change costs more than others can make up for.
REACH = 0.25
#: Part of the cost of a step that an exchange must win.
WORTH = 1e-4
#: Entries of the largest temporary while grids are compared; rows are taken in parts to keep to it.
WORKSPACE, ACCELERATED = 1 << 21, 1 << 24


def round_group(
    U: torch.Tensor, D: torch.Tensor, target: torch.Tensor, feedback: torch.Tensor,
    *, weights: torch.Tensor | None, keep: int, maxq: int, min_zero: int, sym: bool,
    flip_sign: bool = True,
) -> tuple[Grid, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Finds the grid of one group of columns and rounds them, one after another.

    The grid must fit the group's weights as updated by all finished columns, with the group's own later
    columns free to move: W_g = T_g + (t_g - T_g) U_gg⁻¹, a unit-triangular solve.

    Args:
        U: [n, n], the group's block of the unit upper triangular factor.
        D: [n], its pivots.
        target: [n, rows], T_g.
        asked: [n, rows], t_g - T_g as far as finished columns ask for it.
        weights: [n], of squared errors in the grid search; None: the range of the weights, no search.
        keep: grids that are rounded with, to choose the one of least true loss.
        maxq, min_zero, sym: the grid, see `core.grid`; flip_sign: see `core.search`.

    Returns:
        The grid of each row; codes uint8 [n, rows]; E = target - value [n, rows]; the loss of each
        row, Σ_j D_j (t_j - q_j)².

    Raises:
        NumericalError: a scale does not fit float16.
    """
    shrink = SHRINK.to(target)
    if cpp.usable(target):
        return cpp.round_group(
            U, D, target, feedback,
            weights=weights, shrink=shrink, keep=keep, maxq=maxq, min_zero=min_zero, sym=sym,
            flip_sign=flip_sign,
        )  # fmt: skip
    most = WORKSPACE if target.device.type == "cpu" else ACCELERATED
    rows = max(1, most // (len(target) * keep))
    found: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, target.shape[1], rows):
        T, asks = target[:, start : start + rows], feedback[:, start : start + rows]
        moved = torch.linalg.solve_triangular(U.T, asks, upper=False, unitriangular=True)
        W_g = moved.add_(T)
        if weights is None:
            grid = minmax(W_g.T, maxq, sym=sym, min_zero=min_zero)
            found.append((*grid, *_round_columns(U, D, T, asks, grid, maxq)))
        else:
            grids = best_grids(
                W_g, weights, maxq, sym=sym, min_zero=min_zero, keep=keep, flip_sign=flip_sign
            )
            found.append(_best_candidate(U, D, T, asks, grids, maxq))
    scale, zero, codes, E, loss = (torch.cat(part, dim=-1) for part in zip(*found, strict=True))
    return Grid(scale, zero), codes, E, loss


def round_known(
    U: torch.Tensor, D: torch.Tensor, target: torch.Tensor, feedback: torch.Tensor, grids: Grid,
    index: torch.Tensor, maxq: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Rounds columns whose grids are known: column j uses row `index[j]` of grids [groups, rows].

    Returns:
        codes uint8 [n, rows]; E = target - value [n, rows]; the loss of each row.
    """
    if cpp.usable(target):
        return cpp.round_known(U, D, target, feedback, grids, index, maxq)
    grid = Grid(grids.scale[index], grids.zero[index])
    return _round_columns(U, D, target, feedback, grid, maxq)


def descend(
    H: torch.Tensor, G: torch.Tensor, grids: Grid, index: torch.Tensor, maxq: int,
    codes: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Coordinate descent on a panel of columns: each weight to its best grid point, others fixed.

    Args:
        H: [n, n], the panel's block of the Hessian.
        G: [n, rows], (Q - T) H as it was in front of the panel.
        grids: [groups, rows].
        index: int64 [n], the row of `grids` that each column uses.
        maxq: largest code.
        codes: uint8 [n, rows], improved in place.

    Returns:
        By how much each value of Q moved, [n, rows].
    """
    if cpp.usable(G):
        return cpp.descend(H, G, grids, index, maxq, codes, 1)
    if triton.usable(G):
        return triton.descend(H, G, grids, index, maxq, codes, 1)
    G, change = G.clone(), torch.empty_like(G)
    for j in range(len(G)):
        grid = Grid(grids.scale[index[j]], grids.zero[index[j]])
        before = codes[j].to(G.dtype)
        best = (decode(before, grid) - G[j] / H[j, j]).div_(grid.scale)
        after = best.round_().add_(grid.zero).clamp_(0, maxq)
        change[j] = (after - before).mul_(grid.scale)
        codes[j] = after.to(torch.uint8)
        if j + 1 < len(G):
            G[j + 1 :].addr_(H[j + 1 :, j], change[j])
    return change


def exchange(
    H: torch.Tensor, G: torch.Tensor, grids: Grid, index: torch.Tensor, maxq: int,
    codes: torch.Tensor, moves: int,
) -> torch.Tensor:  # fmt: skip
    """Codes of a row that move together: where no single one can be bettered, several still can.

    First each column in turn goes to its best code, all others fixed. Then each moves to its next best;
    up to `moves` - 1 times the column that gains most answers with its best move; and all of it is
    taken back unless the loss is lower in the end.

    Args:
        H, G, grids, index, maxq, codes: as for `descend`.
        moves: how many codes of a row may move together.

    Returns:
        By how much each value of Q moved, [n, rows].
    """
    if cpp.usable(G):
        return cpp.descend(H, G, grids, index, maxq, codes, moves)
    if triton.usable(G):
        return triton.descend(H, G, grids, index, maxq, codes, moves)
    scale, before, row = (
        grids.scale[index],
        codes.to(G.dtype),
        torch.arange(G.shape[1], device=G.device),
    )
    diagonal = H.diagonal()[:, None]
    own, ratio = scale.square() * diagonal, -1 / (scale * diagonal)
    now, G = before.clone(), G.clone()
    for i in range(len(G)):
        best = (G[i] * ratio[i]).clamp(-now[i], maxq - now[i]).round_()
        now[i] += best
        G.addr_(H[:, i], best * scale[i])
    for i in range(len(G)):
        wanted = G[i] * ratio[i]
        first = wanted.clamp(-now[i], maxq - now[i]).round_()
        far = (first != 0) | (wanted.abs() >= REACH)
        first = torch.where(first != 0, first, 1.0 - 2.0 * (wanted < 0).to(G.dtype))
        far &= (first >= -now[i]) & (first <= maxq - now[i])
        total = (first - 2 * wanted) * first * own[i]
        tried, gradient = now.clone(), G.addr(H[:, i], first * scale[i])
        for _ in range(moves - 1):
            aimed = gradient * ratio
            step = aimed.clamp(-tried, maxq - tried).round_()
            cost = (step - 2 * aimed) * step * own
            cost[i] = 0.0  # it must not move back
            least, j = cost.min(dim=0)
            answer = torch.where(least < 0, step[j, row], 0.0)
            total += least
            tried[j, row] += answer
            gradient += H[:, j] * (answer * scale[j, row])
        tried[i] += first
        better = far & (total < -WORTH * own[i])
        now, G = torch.where(better, tried, now), torch.where(better, gradient, G)
    codes.copy_(now.to(torch.uint8))
    return (now - before).mul_(scale)


def _best_candidate(
    U: torch.Tensor,
    D: torch.Tensor,
    T: torch.Tensor,
    feedback: torch.Tensor,
    grids: Grid,
    maxq: int,
) -> tuple[torch.Tensor, ...]:
    """Rounds with each of the grids [candidates, rows]; scale, zero, codes, E, loss of the least."""
    count, width = grids.scale.shape
    flat = Grid(grids.scale.reshape(-1), grids.zero.reshape(-1))
    codes, E, loss = _round_columns(U, D, T.repeat(1, count), feedback.repeat(1, count), flat, maxq)
    best = loss.view(count, width).argmin(dim=0)
    pick = best * width + torch.arange(width, device=best.device)
    return flat.scale[pick], flat.zero[pick], codes[:, pick], E[:, pick], loss[pick]


def _round_columns(
    U: torch.Tensor, D: torch.Tensor, T: torch.Tensor, feedback: torch.Tensor, grid: Grid, maxq: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The recursion: codes uint8 and errors [n, rows], loss [rows].

    `grid` is one per row, or one per column and row.
    """
    t = feedback + T
    codes, E = torch.empty_like(t, dtype=torch.uint8), torch.empty_like(t)
    scale, zero = grid.scale.expand_as(t), grid.zero.expand_as(t)
    round_panel = triton.round_panel if triton.usable(t) else _round_panel
    for a in range(0, len(t), PANEL):
        part = slice(a, min(a + PANEL, len(t)))
        if a:
            t[part] += U[:a, part].T @ E[:a]
        at = Grid(scale[part], zero[part])
        round_panel(U[part, part], T[part], t[part], at, maxq, codes[part], E[part])
    # t - q = (t - T) + (T - q)
    loss = D @ t.sub_(T).add_(E).square_()
    return codes, E, loss


def _round_panel(
    U: torch.Tensor, T: torch.Tensor, t: torch.Tensor, grid: Grid, maxq: int,
    codes: torch.Tensor, E: torch.Tensor,
) -> None:  # fmt: skip
    """`gpu.round_panel` in plain torch."""
    for j in range(len(t)):
        if j:
            t[j].addmv_(E[:j].T, U[:j, j])
        at = Grid(grid.scale[j], grid.zero[j])
        nearest = encode(t[j], at, maxq)
        codes[j] = nearest.to(torch.uint8)
        torch.sub(T[j], decode(nearest, at), out=E[j])
