"""GPTQ in its LDL form: rounds the columns of W one after another, each making up for those before.

With Ĥ = U D Uᵀ (core.factor) the layer's loss splits into one term per column,

    tr((T - Q) Ĥ (T - Q)ᵀ) = Σ_j D_j (t_j - q_j)²,    t_j = T_j + Σ_{i<j} (T_i - q_i) U[i, j]

so q_j = round(t_j) is the greedy choice, column by column. These are the codes of the published
recursion (Frantar et al. 2022, algorithm 1), which pushes each error forward through the Cholesky
factor of Ĥ⁻¹; here past errors are looked *back* at through a panel of U, so that no inverse is
needed and finished columns are never rewritten. Rows are independent given Ĥ. T is W, or W corrected
for what earlier layers lost (core.correct).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.correct import corrected
from roundwise.core.factor import Factor, factor
from roundwise.core.grid import Grid, decode, encode, minmax
from roundwise.core.order import Order, processing_order
from roundwise.core.quantized import QuantizedWeight
from roundwise.core.refine import refine
from roundwise.core.search import best_grids
from roundwise.errors import ConfigError, NumericalError

#: Columns rounded between two matrix products with all past errors.
PANEL = 128
#: Entries of the largest temporary while grids are compared; rows are taken in parts to keep to it.
WORKSPACE = 1 << 21
#: Entries of the part of a weight that is solved at a time.
ROW_WORKSPACE = 1 << 22


class Prepared(NamedTuple):
    """What all weights that read the same input share: H, the order of columns, the factor of H."""

    H: torch.Tensor
    order: Order
    factor: Factor


def prepare(H: torch.Tensor, config: QuantizeConfig) -> Prepared:
    """Orders the columns and factors the Hessian, once for all weights that share it.

    Args:
        H: Hessian XᵀX / n [in, in] of the layer's input (any constant factor cancels); not changed.
        config: its `group_size`, `desc_act`, `order` and `damp_percent` count.

    Raises:
        SingularError: H is zero, or no damping makes it definite.
        NumericalError: NaN or infinity in H.
    """
    order = processing_order(H.diagonal(), config)
    return Prepared(H, order, factor(H, order.perm, config.damp_percent))


def solve(
    W: torch.Tensor,
    H: torch.Tensor | Prepared,
    config: QuantizeConfig | None = None,
    *,
    lost: torch.Tensor | None = None,
    grids: Grid | None = None,
) -> QuantizedWeight:
    """Quantizes one weight so that its output on the calibration inputs survives.

    Args:
        W: weight [out, in], any float dtype. Work is done in float32, or float64 if W is float64.
        H: Hessian XᵀX / n [in, in] of the layer's input (any constant factor cancels), or what
            `prepare` made of it with the same settings.
        config: settings; `dynamic` is not looked at here.
        lost: what earlier layers lost and this one is to make up for, [out, in]; see
            `core.correct.Drift.lost`.
        grids: fixed grids, `scale` and `zero` each [out, groups], instead of searched ones; the
            scales should be float16 values.

    Returns:
        Codes in the original channel order, with `relative_error` and the damping used.

    Raises:
        ConfigError: shapes that do not fit.
        SingularError: H is zero, or no damping makes it definite.
        NumericalError: NaN or infinity in W or H.
    """
    config = config or QuantizeConfig()
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    W = _checked(W, dtype)
    if isinstance(H, torch.Tensor):
        if H.shape != (W.shape[1], W.shape[1]):
            raise ConfigError(f"H is {tuple(H.shape)}; W {tuple(W.shape)} needs [in, in]")
        H = prepare(H.to(dtype), config)
    if len(H.H) != W.shape[1]:
        raise ConfigError(f"H has {len(H.H)} channels, W {tuple(W.shape)} has {W.shape[1]}")
    # Rows are independent given H: taken in parts, all temporaries are small.
    parts, sums = [], torch.zeros(4, dtype=torch.float64)
    step = max(1, ROW_WORKSPACE // W.shape[1])
    with _damped(H):
        for start in range(0, W.shape[0], step):
            rows = slice(start, start + step)
            fixed = None if grids is None else Grid(grids.scale[rows], grids.zero[rows])
            q = _solve_rows(W[rows], H, config, None if lost is None else lost[rows], fixed)
            parts.append(q)
            sums += _errors(q, W[rows], H)
    loss, energy, errors, weights = sums.tolist()
    return replace(
        parts[0],
        codes=torch.cat([q.codes for q in parts]),
        scales=torch.cat([q.scales for q in parts]),
        zeros=torch.cat([q.zeros for q in parts]),
        relative_error=_ratio(loss, energy),
        weight_error=_ratio(errors, weights),
    )


def _solve_rows(
    W: torch.Tensor, H: Prepared, config: QuantizeConfig, lost: torch.Tensor | None, grids: Grid | None
) -> QuantizedWeight:
    """Corrects, rounds and refines some rows; H.H is damped while this runs."""
    order, F = H.order, H.factor
    T = W if lost is None else corrected(W, lost, order.perm, F)
    columns = _Columns(T.T[order.perm].contiguous(), F, order, config)
    if grids is not None or order.fixed_grids:
        columns.set_grids(grids or _fixed_grids(T, H.H, config))
    columns.round_all()
    q = columns.result()
    if config.refine:
        q = refine(q, T, H.H, rounds=config.refine, keep_scales=grids is not None)
    return q


def round_to_nearest(
    W: torch.Tensor, config: QuantizeConfig | None = None, *, fallback: str | None = None
) -> QuantizedWeight:
    """The baseline: each weight to the nearest point of its group's min-max grid, no Hessian.

    Args:
        W: weight [out, in].
        config: settings; only `bits`, `group_size`, `sym` and `format` matter.
        fallback: recorded in the result when this stands in for `solve`.
    """
    config = config or QuantizeConfig()
    W = _checked(W, torch.float64 if W.dtype == torch.float64 else torch.float32)
    size = config.columns_per_group(W.shape[1])
    grids = _stacked(
        [
            minmax(part, config.maxq, sym=config.sym, min_zero=config.min_zero)
            for part in torch.split(W, size, dim=1)
        ]
    )
    g_idx = torch.arange(W.shape[1]) // size
    wide = Grid(grids.scale[:, g_idx], grids.zero[:, g_idx])
    codes = encode(W, wide, config.maxq)
    error = float((W - decode(codes, wide)).square().sum())
    return QuantizedWeight(
        codes=codes.to(torch.uint8),
        scales=grids.scale.to(torch.float16),
        zeros=grids.zero.to(torch.int32),
        g_idx=g_idx.to(torch.int32),
        bits=config.bits,
        weight_error=_ratio(error, float(W.square().sum())),
        fallback=fallback,
    )


class _Columns:
    """The recursion's state, transposed so that a column of T is one contiguous row.

    Tt, E [in, out]: targets, and errors T - q; scale, zero [groups, out]; codes uint8 [in, out].
    """

    def __init__(self, Tt: torch.Tensor, F: Factor, order: Order, config: QuantizeConfig) -> None:
        self.Tt, self.F, self.order, self.config = Tt, F, order, config
        groups = config.groups(Tt.shape[0])
        self.E = torch.zeros_like(Tt)
        self.codes = torch.empty(Tt.shape, dtype=torch.uint8, device=Tt.device)
        self.scale = Tt.new_empty(groups, Tt.shape[1])
        self.zero = Tt.new_empty(groups, Tt.shape[1])
        self.grids_known = False

    def set_grids(self, grids: Grid) -> None:
        """Fixes all grids ([out, groups]) before the first column."""
        self.scale.copy_(grids.scale.T)
        self.zero.copy_(grids.zero.T)
        self.grids_known = True

    def round_all(self) -> None:
        """Rounds every column in order, one segment after another."""
        for a, b in self._segments():
            # What all finished columns ask of this segment: one matrix product.
            asked = self.F.U[:a, a:b].T @ self.E[:a]
            if self.grids_known:
                group = self.order.group[a:b]
                grid = Grid(self.scale[group], self.zero[group])
                self._keep(a, b, slice(None), self._rounded(a, b, asked, slice(None), grid))
                continue
            rows = max(1, WORKSPACE // ((b - a) * max(1, self.config.grid_candidates)))
            for start in range(0, asked.shape[1], rows):
                self._group(a, b, asked, slice(start, start + rows))

    def _segments(self) -> list[tuple[int, int]]:
        """Runs of columns that share a grid; panels when all grids are known beforehand."""
        width, groups = len(self.Tt), self.order.group
        if self.grids_known:
            return list(pairwise([*range(0, width, PANEL), width]))
        # Found from the groups, not by counting: a shorter one need not be processed last.
        cuts = ((groups[1:] != groups[:-1]).nonzero().flatten() + 1).tolist()
        return list(pairwise([0, *cuts, width]))

    def _group(self, a: int, b: int, asked: torch.Tensor, rows: slice) -> None:
        """Finds the grid of one group for some rows, and rounds it.

        The grid must fit the group's weights as updated by all finished columns, with the group's
        own later columns free to move: W_g = T_g + (t_g - T_g) U_gg⁻¹, a unit-triangular solve.
        """
        config, U = self.config, self.F.U[a:b, a:b]
        moved = torch.linalg.solve_triangular(U.T, asked[:, rows], upper=False, unitriangular=True)
        W_g = moved.add_(self.Tt[a:b, rows])
        if config.grid == "minmax":
            grid = minmax(W_g.T, config.maxq, sym=config.sym, min_zero=config.min_zero)
            best = self._rounded(a, b, asked, rows, grid)
        else:
            weights = self.F.D[a:b] if config.grid == "pivot" else torch.ones_like(self.F.D[a:b])
            grids = best_grids(
                W_g, weights, config.maxq,
                sym=config.sym, min_zero=config.min_zero, keep=config.grid_candidates,
            )  # fmt: skip
            grid, best = self._cheapest(a, b, asked, rows, grids)
        group = self.order.group[a]
        self.scale[group, rows], self.zero[group, rows] = grid
        self._keep(a, b, rows, best)

    def _cheapest(
        self, a: int, b: int, asked: torch.Tensor, rows: slice, grids: Grid
    ) -> tuple[Grid, tuple[torch.Tensor, torch.Tensor]]:
        """Rounds the group with each of the grids [candidates, rows]; per row, the least loss wins."""
        count, width = grids.scale.shape
        if count == 1:
            grid = Grid(grids.scale[0], grids.zero[0])
            return grid, self._rounded(a, b, asked, rows, grid)
        flat = Grid(grids.scale.reshape(-1), grids.zero.reshape(-1))
        codes, E, loss = self._rounded_with_loss(a, b, asked, rows, flat, repeat=count)
        best = loss.view(count, width).argmin(dim=0)
        pick = best * width + torch.arange(width, device=best.device)
        return Grid(flat.scale[pick], flat.zero[pick]), (codes[:, pick], E[:, pick])

    def _rounded(
        self, a: int, b: int, asked: torch.Tensor, rows: slice, grid: Grid
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes, E, _ = self._rounded_with_loss(a, b, asked, rows, grid, repeat=1)
        return codes, E

    def _rounded_with_loss(
        self, a: int, b: int, asked: torch.Tensor, rows: slice, grid: Grid, *, repeat: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The recursion on columns a … b-1: codes and errors [b - a, rows], loss [rows].

        `grid` is one per row, or one per column and row; `repeat` rounds each row that many times.
        """
        U = self.F.U[a:b, a:b]
        targets = self.Tt[a:b, rows].repeat(1, repeat)
        t = asked[:, rows].repeat(1, repeat) + targets
        codes, E = torch.empty_like(t), torch.empty_like(t)
        scale, zero = grid.scale.expand_as(t), grid.zero.expand_as(t)
        for j in range(b - a):
            start = j - j % PANEL
            if start and start == j:
                stop = min(j + PANEL, b - a)
                t[j:stop] += U[:j, j:stop].T @ E[:j]
            if j > start:
                t[j].addmv_(E[start:j].T, U[start:j, j])
            at = Grid(scale[j], zero[j])
            codes[j] = encode(t[j], at, self.config.maxq)
            torch.sub(targets[j], decode(codes[j], at), out=E[j])
        # t - q = (t - T) + (T - q)
        loss = self.F.D[a:b] @ t.sub_(targets).add_(E).square_()
        return codes, E, loss

    def _keep(self, a: int, b: int, rows: slice, best: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.codes[a:b, rows], self.E[a:b, rows] = best[0].to(torch.uint8), best[1]

    def result(self) -> QuantizedWeight:
        """Back to [out, in] and the original channel order."""
        codes = torch.empty_like(self.codes)
        codes[self.order.perm] = self.codes
        return QuantizedWeight(
            codes=codes.T.contiguous(),
            scales=self.scale.T.contiguous().to(torch.float16),
            zeros=self.zero.T.contiguous().to(torch.int32),
            g_idx=self.order.g_idx(),
            bits=self.config.bits,
            damp_percent=self.F.damp_percent,
            damp_tried=self.F.tried,
        )


@contextmanager
def _damped(H: Prepared) -> Iterator[None]:
    """Damping on the diagonal of H.H while the block runs; a damped copy would be as large as H."""
    diagonal = H.H.diagonal().clone()
    H.H.diagonal().add_(H.factor.shift)
    try:
        yield
    finally:
        H.H.diagonal().copy_(diagonal)


def _errors(q: QuantizedWeight, W: torch.Tensor, H: Prepared) -> torch.Tensor:
    """tr(E H Eᵀ), tr(W H Wᵀ), ||E||², ||W||² of what is stored, E = W - Q; without any damping."""
    perm, F = H.order.perm, H.factor
    found = []
    for X in (W - q.dequantize(W.dtype), W):
        norm = float(X.square().sum())
        found.append((max(F.quadratic(X.T[perm]) - F.shift * norm, 0.0), norm))
    (loss, errors), (energy, weights) = found
    return torch.tensor([loss, energy, errors, weights], dtype=torch.float64)


def _fixed_grids(T: torch.Tensor, H: torch.Tensor, config: QuantizeConfig) -> Grid:
    """Grids of the original groups of T [out, in] before any column is rounded, each [out, groups]."""
    size = config.columns_per_group(T.shape[1])
    found = []
    for start in range(0, T.shape[1], size):
        part = T[:, start : start + size]
        if config.grid == "minmax":
            found.append(minmax(part, config.maxq, sym=config.sym, min_zero=config.min_zero))
            continue
        weights = H.diagonal()[start : start + size]
        weights = weights if config.grid == "pivot" else torch.ones_like(weights)
        grids = best_grids(
            part.T, weights, config.maxq, sym=config.sym, min_zero=config.min_zero, keep=1
        )
        found.append(Grid(grids.scale[0], grids.zero[0]))
    return _stacked(found)


def _stacked(grids: list[Grid]) -> Grid:
    """Grids of [out] each, as one of [out, groups]."""
    scales, zeros = zip(*grids, strict=True)
    return Grid(torch.stack(scales, dim=1), torch.stack(zeros, dim=1))


def _checked(W: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if W.ndim != 2 or not W.numel():
        raise ConfigError(f"W is {tuple(W.shape)}; a weight is [out, in]")
    W = W.detach().to(dtype)
    if not math.isfinite(float(W.sum(dtype=torch.float64))):
        raise NumericalError("NaN or infinity in the weight")
    return W


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
