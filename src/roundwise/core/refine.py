"""After rounding: better scales for the codes, better codes for the scales, alternately.

No step raises the layer's objective tr((Q - T) Ĥ (Q - T)ᵀ). The *refit* is the least-squares solution
for all scales of a row at once, rounded to float16 and kept only where it helps. The *descent* puts each
weight on its best grid point with all others fixed (coordinate descent; QuantEase, arXiv 2309.01885,
and CDQuant, arXiv 2406.17542, use the same step). The *exchange* continues where descent ends: one code
moves although that costs, others compensate, and a chain of moves that does not pay is undone (as Lin
and Kernighan, 1973, search for short tours).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from roundwise.core.backends.base import PANEL, WINDOW, CodePanel, ColumnGrids, SolverBackend
from roundwise.core.grid import MAX_SCALE, MIN_SCALE, Grid
from roundwise.core.linalg import matmul, permuted_columns
from roundwise.core.quantized_weight import QuantizedWeight


class Refiner:
    """A solved weight while it is improved; as in the solver, matrices are [columns, rows].

    Columns are sorted by group, which changes nothing unless the file has a g_idx of its own.

    Args:
        q: the weight as solved.
        T: target [out, in].
        H: damped Hessian Ĥ [in, in], as it was factored.
        backend: improves codes.
    """

    def __init__(
        self, q: QuantizedWeight, T: torch.Tensor, H: torch.Tensor, backend: SolverBackend
    ) -> None:
        index = q.g_idx.long()
        self.perm = torch.argsort(index, stable=True)
        self.is_sorted = bool((index[1:] >= index[:-1]).all())
        self.H, self.index, self.maxq, self.backend = H, index[self.perm], 2**q.bits - 1, backend
        self.T, self.codes = permuted_columns(T, self.perm), permuted_columns(q.codes, self.perm)
        self.grids = Grid(*(part.T.to(T.dtype).contiguous() for part in (q.scales, q.zeros)))
        self._TH: torch.Tensor | None = None

    def refit(self) -> None:
        """Finds the best scales of each row for its codes: s = M⁻¹ b, kept where the row's loss falls.

        With V = codes - zeros: M[g, h] = Σ_{i in g, k in h} V_i Ĥ_ik V_k, b[g] = Σ_{i in g} V_i (T Ĥ)_i.
        """
        if self._TH is None:
            self._TH = self._times_h(self.T)
        V = self.codes - self.grids.zero[self.index]
        groups, rows = self.grids.scale.shape
        b = self._sum_by_group(V * self._TH)
        M = V.new_zeros(groups, groups, rows)
        for group in range(groups):
            # M is symmetric: only the groups from this one on are computed.
            start = int(torch.searchsorted(self.index, group))
            stop = int(torch.searchsorted(self.index, group, right=True))
            products = matmul(self._block(slice(start, None), slice(start, stop)), V[start:stop])
            M[group, group:] = self._sum_by_group(products.mul_(V[start:]), start)[group:]
            M[group + 1 :, group] = M[group, group + 1 :]
        M, b = M.permute(2, 0, 1).contiguous(), b.T.contiguous()
        scale = self.grids.scale.T
        # A group whose codes are all zero points does not change the loss: keep its scale.
        unused = M.diagonal(dim1=1, dim2=2) <= 0
        M.diagonal(dim1=1, dim2=2)[unused] = 1.0
        b = torch.where(unused, scale, b)
        fitted, info = torch.linalg.solve_ex(M, b)
        stored = fitted.sign() * fitted.abs().clamp(MIN_SCALE, MAX_SCALE)
        stored = stored.to(torch.float16).to(fitted.dtype)

        def loss(s: torch.Tensor) -> torch.Tensor:
            return ((M @ s[:, :, None])[:, :, 0] * s).sum(dim=1) - 2 * (b * s).sum(dim=1)

        # A scale keeps its sign: with the other one, a symmetric grid would be a different grid.
        same_sign = (stored.sign() == scale.sign()) & torch.isfinite(stored)
        better = same_sign.all(dim=1) & (info == 0) & (loss(stored) < loss(scale))
        self.grids.scale.copy_(torch.where(better[:, None], stored, scale).T)

    def descend(self) -> None:
        """Moves each code to its best value, all others fixed, in one sweep over the columns."""
        self._sweep(PANEL, self.backend.descend)

    def exchange(self, moves: int) -> None:
        """Lets up to `moves` codes of a row move together, in one sweep over the columns."""
        self._sweep(WINDOW, partial(self.backend.exchange, moves=moves))

    def _sweep(
        self,
        width: int,
        improve: Callable[[CodePanel, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        """Improves the codes of one panel of columns after another, all other columns fixed.

        Args:
            width: columns of a panel.
            improve: takes the panel, the gradient of its columns and their codes, which it changes;
                returns by how much each value of Q moved.
        """
        scale, zero = self.grids
        minus_E = (self.codes - zero[self.index]).mul_(scale[self.index]).sub_(self.T)  # Q - T
        for a in range(0, len(minus_E), width):
            b = min(a + width, len(minus_E))
            H = self._block(slice(a, b), slice(None))
            panel = CodePanel(H[:, a:b], ColumnGrids(self.grids, self.index[a:b], self.maxq))
            # The gradient of these columns, after all panels before them: one product per sweep.
            G = matmul(H, minus_E)
            minus_E[a:b] += improve(panel, G, self.codes[a:b])

    def result(self, q: QuantizedWeight) -> QuantizedWeight:
        """Returns `q` with the improved codes and scales."""
        codes = torch.empty_like(self.codes)
        codes[self.perm] = self.codes
        return replace(
            q,
            codes=codes.T.contiguous(),
            scales=self.grids.scale.T.contiguous().to(torch.float16),
        )

    def _sum_by_group(self, X: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Sums up the columns of each group: X [columns from `start` on, rows] -> [groups, rows]."""
        groups, index = len(self.grids.scale), self.index[start:]
        if X.is_cuda:
            # index_add_ on a GPU adds in another order each time; a product does not.
            return (index == torch.arange(groups, device=X.device)[:, None]).to(X.dtype) @ X
        return X.new_zeros(groups, X.shape[1]).index_add_(0, index, X)

    def _block(self, rows: slice, columns: slice) -> torch.Tensor:
        """Returns a block of Ĥ, rows and columns sorted by group. Not all of it: that may be a copy."""
        if self.is_sorted:
            return self.H[rows, columns]
        return self.H[self.perm[rows, None], self.perm[columns]]

    def _times_h(self, X: torch.Tensor) -> torch.Tensor:
        """Returns Ĥ X for X [columns, rows]."""
        if self.is_sorted:
            return matmul(self.H, X)
        HX = torch.empty_like(X)
        for a in range(0, len(X), PANEL):
            HX[a : a + PANEL] = matmul(self._block(slice(a, a + PANEL), slice(None)), X)
        return HX


def refine(
    q: QuantizedWeight, T: torch.Tensor, H: torch.Tensor, *, rounds: int, moves: int,
    keep_scales: bool, backend: SolverBackend,
) -> QuantizedWeight:  # fmt: skip
    """Improves the scales and then the codes of a solved weight `rounds` times, then the scales again.

    Args:
        q, T, H, backend: as for `Refiner`.
        rounds: how many times; 0 returns q as it is.
        moves: largest number of codes of a row that move together; 1: coordinate descent.
        keep_scales: improve only the codes.

    Returns:
        `q` with other codes and scales; its errors are not measured again.
    """
    refiner = Refiner(q, T, H, backend)
    for _ in range(rounds):
        if not keep_scales:
            refiner.refit()
        if moves > 1:
            refiner.exchange(moves)
        else:
            refiner.descend()
    if rounds and not keep_scales:
        refiner.refit()
    return refiner.result(q)
