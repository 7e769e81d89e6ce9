"""GPTQ in its LDL form: rounds the columns of W one after another, each making up for those before.

With H = U D Uᵀ (core.factor) the layer's loss splits into one term per column,

    tr((W - Q) H (W - Q)ᵀ) = Σ_j D_j (t_j - q_j)²,    t_j = w_j + Σ_{i<j} (w_i - q_i) U[i, j]

so q_j = round(t_j) is the greedy choice, column by column. These are the codes of the published
recursion (Frantar et al. 2022, algorithm 1), which pushes each error forward through the Cholesky
factor of H⁻¹; here past errors are looked *back* at through a panel of U, so that no inverse is
needed and finished columns are never rewritten. Rows are independent given H.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.factor import Factor, factor
from roundwise.core.grid import Grid, decode, encode, minmax
from roundwise.core.order import Order, processing_order
from roundwise.core.quantized import QuantizedWeight
from roundwise.errors import ConfigError, NumericalError

#: Columns rounded between two matrix products with all past errors.
PANEL = 128


class Prepared(NamedTuple):
    """What all weights that read the same input share: the order of columns and the factor of H."""

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
    return Prepared(order, factor(H, order.perm, config.damp_percent))


def solve(
    W: torch.Tensor,
    H: torch.Tensor | Prepared,
    config: QuantizeConfig | None = None,
    *,
    grids: Grid | None = None,
) -> QuantizedWeight:
    """Quantizes one weight so that its output on the calibration inputs survives.

    Args:
        W: weight [out, in], any float dtype. Work is done in float32, or float64 if W is float64.
        H: Hessian XᵀX / n [in, in] of the layer's input (any constant factor cancels), or what
            `prepare` made of it with the same settings.
        config: settings; `dynamic` is not looked at here.
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
    order, F = H
    if len(F.D) != W.shape[1]:
        raise ConfigError(f"H has {len(F.D)} channels, W {tuple(W.shape)} has {W.shape[1]}")
    columns = _Columns(W.T[order.perm].contiguous(), F, order, config)
    if grids is not None or order.fixed_grids:
        columns.set_grids(grids or _grids_by_group(W, config))
    columns.round_all()
    return columns.result()


def round_to_nearest(
    W: torch.Tensor, config: QuantizeConfig | None = None, *, fallback: str | None = None
) -> QuantizedWeight:
    """The baseline: each weight to the nearest point of its group's min-max grid, no Hessian.

    Args:
        W: weight [out, in].
        config: settings; `desc_act`, `order` and `damp_percent` do not matter.
        fallback: recorded in the result when this stands in for `solve`.
    """
    config = config or QuantizeConfig()
    W = _checked(W, torch.float64 if W.dtype == torch.float64 else torch.float32)
    grids = _grids_by_group(W, config)
    size = W.shape[1] if config.group_size == -1 else config.group_size
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
    """The recursion's state, transposed so that a column of W is one contiguous row.

    Wt, E [in, out]: weights and errors w - q; scale, zero [groups, out]; codes uint8 [in, out].
    `loss` and `energy` sum up tr(E Ĥ Eᵀ) and tr(W Ĥ Wᵀ) with the damped Ĥ = U D Uᵀ.
    """

    def __init__(self, Wt: torch.Tensor, F: Factor, order: Order, config: QuantizeConfig) -> None:
        self.F, self.order, self.config = F, order, config
        groups = config.groups(Wt.shape[0])
        # Side by side, so that one matrix product looks back at both.
        self.EW = torch.cat([torch.zeros_like(Wt), Wt], dim=1)
        self.E, self.Wt = torch.split(self.EW, Wt.shape[1], dim=1)
        self.loss = self.energy = 0.0
        self.codes = torch.empty(Wt.shape, dtype=torch.uint8, device=Wt.device)
        self.scale = Wt.new_empty(groups, Wt.shape[1])
        self.zero = Wt.new_empty(groups, Wt.shape[1])
        self.grids_known = False

    def set_grids(self, grids: Grid) -> None:
        """Fixes all grids ([out, groups]) before the first column."""
        self.scale.copy_(grids.scale.T)
        self.zero.copy_(grids.zero.T)
        self.grids_known = True

    def round_all(self) -> None:
        """Rounds every column in order."""
        U, D = self.F.U, self.F.D
        for start, stop in self._segments():
            # What all finished columns ask of this segment, and the same of W itself.
            asked = U[:start, start:stop].T @ self.EW[:start]
            T, V = torch.split(asked, self.Wt.shape[1], dim=1)
            V = V + U[start:stop, start:stop].T @ self.Wt[start:stop]
            self.energy += float(D[start:stop] @ V.square().sum(dim=1))
            if not self.grids_known:
                self._find_grid(start, stop, T)
            T = T + self.Wt[start:stop]
            for a in range(start, stop, PANEL):
                b = min(a + PANEL, stop)
                if a > start:
                    T[a - start : b - start] += U[start:a, a:b].T @ self.E[start:a]
                self._round_panel(a, b, T[a - start : b - start])

    def _segments(self) -> list[tuple[int, int]]:
        """Runs of columns with one grid; panels when grids are known beforehand."""
        width = len(self.Wt)
        size = PANEL if self.grids_known else self.config.group_size
        if size == -1:
            return [(0, width)]
        # A short group (in not divisible by group_size) need not be processed last.
        groups = self.order.group
        cuts = [0, *range(size, width, size), width]
        if not self.grids_known:
            cuts = [0, *((groups[1:] != groups[:-1]).nonzero().flatten() + 1).tolist(), width]
        return list(pairwise(cuts))

    def _find_grid(self, start: int, stop: int, T: torch.Tensor) -> None:
        """The group's grid, fitted to its weights as updated by all finished columns.

        T looks back only at finished columns; the updated weights also let the group's own later
        columns move freely: W_g = w_g + (t_g - w_g) U_gg⁻¹ (a unit-triangular solve).
        """
        U = self.F.U[start:stop, start:stop]
        moved = torch.linalg.solve_triangular(U.T, T, upper=False, unitriangular=True)
        group = self.order.group[start]
        grid = minmax(
            (self.Wt[start:stop] + moved).T,
            self.config.maxq,
            sym=self.config.sym,
            min_zero=self.config.min_zero,
        )
        self.scale[group], self.zero[group] = grid

    def _round_panel(self, a: int, b: int, T: torch.Tensor) -> None:
        """Rounds columns a … b-1; T [b - a, out] holds what columns before `a` ask of them."""
        group = self.order.group[a:b].tolist()
        U, E, Wt = self.F.U[a:b, a:b], self.E[a:b], self.Wt[a:b]
        codes = torch.empty_like(T)
        for j in range(b - a):
            if j:
                T[j].addmv_(E[:j].T, U[:j, j])
            grid = Grid(self.scale[group[j]], self.zero[group[j]])
            codes[j] = encode(T[j], grid, self.config.maxq)
            torch.sub(Wt[j], decode(codes[j], grid), out=E[j])
        self.codes[a:b] = codes.to(torch.uint8)
        # t - q = (t - w) + (w - q)
        residual = T - Wt + E
        self.loss += float(self.F.D[a:b] @ residual.square().sum(dim=1))

    def result(self) -> QuantizedWeight:
        """Back to [out, in] and the original channel order."""
        errors, weights = float(self.E.square().sum()), float(self.Wt.square().sum())
        # Damping is not part of the reported error: tr(E H Eᵀ) = tr(E Ĥ Eᵀ) - shift·||E||².
        loss = max(self.loss - self.F.shift * errors, 0.0)
        energy = max(self.energy - self.F.shift * weights, 0.0)
        codes = torch.empty_like(self.codes)
        codes[self.order.perm] = self.codes
        return QuantizedWeight(
            codes=codes.T.contiguous(),
            scales=self.scale.T.contiguous().to(torch.float16),
            zeros=self.zero.T.contiguous().to(torch.int32),
            g_idx=self.order.g_idx(),
            bits=self.config.bits,
            relative_error=_ratio(loss, energy),
            weight_error=_ratio(errors, weights),
            damp_percent=self.F.damp_percent,
            damp_tried=self.F.tried,
        )


def _grids_by_group(W: torch.Tensor, config: QuantizeConfig) -> Grid:
    """Min-max grids of the original groups of W [out, in]: scale and zero, each [out, groups]."""
    size = W.shape[1] if config.group_size == -1 else config.group_size
    grids = [
        minmax(part, config.maxq, sym=config.sym, min_zero=config.min_zero)
        for part in torch.split(W, size, dim=1)
    ]
    return Grid(
        torch.stack([grid.scale for grid in grids], dim=1),
        torch.stack([grid.zero for grid in grids], dim=1),
    )


def _checked(W: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if W.ndim != 2 or not W.numel():
        raise ConfigError(f"W is {tuple(W.shape)}; a weight is [out, in]")
    W = W.detach().to(dtype)
    if not math.isfinite(float(W.sum(dtype=torch.float64))):
        raise NumericalError("NaN or infinity in the weight")
    return W


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
