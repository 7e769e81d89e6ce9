"""After rounding: better scales for the codes, better codes for the scales, in turn.

All of it lowers the layer's objective tr((Q - T) Ĥ (Q - T)ᵀ) or leaves it: the refit is the
least-squares solution for all scales of a row at once, rounded to float16 and kept only where it helps;
the descent puts each weight on its best grid point with all others fixed (coordinate descent;
QuantEase, arXiv 2309.01885, and CDQuant, arXiv 2406.17542, use the same step); the exchange goes on
where that ends: one code moves although it costs, others answer, and what does not pay is taken back
(as Lin and Kernighan, 1973, search for short tours).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from roundwise.core.act_order import permuted_columns
from roundwise.core.backends.reference import PANEL, WINDOW, descend, exchange
from roundwise.core.grid import MAX_SCALE, MIN_SCALE, Grid
from roundwise.core.linalg import matmul
from roundwise.core.quantized_weight import QuantizedWeight


class Refiner:
    """A solved weight while it is being improved; like in the solver, [columns, rows of the weight].

    Columns are in order of their groups, which is their own order unless the file has a g_idx.

    Args:
        q: the weight as solved.
        T: target [out, in].
        H: damped Hessian [in, in], as it was factored.
    """

    def __init__(self, q: QuantizedWeight, T: torch.Tensor, H: torch.Tensor) -> None:
        index = q.g_idx.long()
        self.perm = torch.argsort(index, stable=True)
        self.trivial = bool((index[1:] >= index[:-1]).all())
        self.H, self.index, self.maxq = H, index[self.perm], 2**q.bits - 1
        self.T, self.codes = permuted_columns(T, self.perm), permuted_columns(q.codes, self.perm)
        self.grids = Grid(*(part.T.to(T.dtype).contiguous() for part in (q.scales, q.zeros)))
        self._TH: torch.Tensor | None = None

    def refit(self) -> None:
        """Codes fixed, the best scales of each row: s = M⁻¹ b, kept where the row's loss falls.

        With V = codes - zeros: M[g, h] = Σ_{i in g, k in h} V_i Ĥ_ik V_k, b[g] = Σ_{i in g} V_i (T Ĥ)_i.
        """
        if self._TH is None:
            self._TH = self._times_h(self.T)
        V = self.codes - self.grids.zero[self.index]
        groups, rows = self.grids.scale.shape
        b = self._by_group(V * self._TH)
        M = V.new_zeros(groups, groups, rows)
        for group in range(groups):
            # M is symmetric: the groups from this one on are enough.
            start = int(torch.searchsorted(self.index, group))
            stop = int(torch.searchsorted(self.index, group, right=True))
            products = matmul(self._block(slice(start, None), slice(start, stop)), V[start:stop])
            M[group, group:] = self._by_group(products.mul_(V[start:]), start)[group:]
            M[group + 1 :, group] = M[group, group + 1 :]
        M, b = M.permute(2, 0, 1).contiguous(), b.T.contiguous()
        scale = self.grids.scale.T
        # A group whose codes all sit on the zero point has no say in the loss: keep its scale.
        silent = M.diagonal(dim1=1, dim2=2) <= 0
        M.diagonal(dim1=1, dim2=2)[silent] = 1.0
        b = torch.where(silent, scale, b)
        fitted, failed = torch.linalg.solve_ex(M, b)
        stored = fitted.sign() * fitted.abs().clamp(MIN_SCALE, MAX_SCALE)
        stored = stored.to(torch.float16).to(fitted.dtype)

        def loss(s: torch.Tensor) -> torch.Tensor:
            return ((M @ s[:, :, None])[:, :, 0] * s).sum(dim=1) - 2 * (b * s).sum(dim=1)

        # A scale keeps its sign: a symmetric range turned around would be another grid.
        same_sign = (stored.sign() == scale.sign()) & torch.isfinite(stored)
        better = same_sign.all(dim=1) & (failed == 0) & (loss(stored) < loss(scale))
        self.grids.scale.copy_(torch.where(better[:, None], stored, scale).T)

    def descend(self) -> None:
        """One sweep over the columns: each weight to its best grid point, all others fixed."""
        self._sweep(PANEL, descend)

    def exchange(self, moves: int) -> None:
        """One sweep in which up to `moves` codes of a row move together (`core.recursion.exchange`)."""
        self._sweep(WINDOW, partial(exchange, moves=moves))

    def _sweep(self, width: int, improve: Callable[..., torch.Tensor]) -> None:
        """Improves the codes of a panel of columns after the other, all others fixed."""
        scale, zero = self.grids
        E = (self.codes - zero[self.index]).mul_(scale[self.index]).sub_(self.T)
        for a in range(0, len(E), width):
            b = min(a + width, len(E))
            rows = self._block(slice(a, b), slice(None))
            index, codes = self.index[a:b], self.codes[a:b]
            # The gradient of these columns only when their turn comes: one product per sweep.
            E[a:b] += improve(rows[:, a:b], matmul(rows, E), self.grids, index, self.maxq, codes)

    def result(self, q: QuantizedWeight) -> QuantizedWeight:
        """`q` with the improved codes and scales."""
        codes = torch.empty_like(self.codes)
        codes[self.perm] = self.codes
        return replace(
            q,
            codes=codes.T.contiguous(),
            scales=self.grids.scale.T.contiguous().to(torch.float16),
        )

    def _by_group(self, X: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Sums of the rows of each group: X [columns from `start` on, rows] -> [groups, rows]."""
        groups, index = len(self.grids.scale), self.index[start:]
        if X.is_cuda:
            # Adding to one place from many threads gives another sum each time; a product does not.
            return (index == torch.arange(groups, device=X.device)[:, None]).to(X.dtype) @ X
        return X.new_zeros(groups, X.shape[1]).index_add_(0, index, X)

    def _block(self, rows: slice, columns: slice) -> torch.Tensor:
        """A part of H in the order used here; never all of it at once, which would be a copy."""
        if self.trivial:
            return self.H[rows, columns]
        return self.H[self.perm[rows, None], self.perm[columns]]

    def _times_h(self, X: torch.Tensor) -> torch.Tensor:
        """H X for X [columns, rows]."""
        if self.trivial:
            return matmul(self.H, X)
        answer = torch.empty_like(X)
        for a in range(0, len(X), PANEL):
            answer[a : a + PANEL] = matmul(self._block(slice(a, a + PANEL), slice(None)), X)
        return answer


def refine(
    q: QuantizedWeight, T: torch.Tensor, H: torch.Tensor, *, rounds: int, moves: int,
    keep_scales: bool,
) -> QuantizedWeight:  # fmt: skip
    """`rounds` times the scales and then the codes of a solved weight, and the scales once more.

    Args:
        q, T, H: as for `Refiner`.
        rounds: how many.
        moves: codes of a row that may move together; 1: each for itself.
        keep_scales: only the codes are improved.
    """
    state = Refiner(q, T, H)
    for _ in range(rounds):
        if not keep_scales:
            state.refit()
        if moves > 1:
            state.exchange(moves)
        else:
            state.descend()
    if rounds and not keep_scales:
        state.refit()
    return state.result(q)
