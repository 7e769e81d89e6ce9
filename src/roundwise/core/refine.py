"""After rounding: better scales for the codes, better codes for the scales, in turn.

Both lower the layer's objective tr((Q - T) Ĥ (Q - T)ᵀ) or leave it: the refit is the least-squares
solution for all scales of a row at once, rounded to float16 and kept only where it helps; the descent
puts each weight on its best grid point with all others fixed (coordinate descent; QuantEase,
arXiv 2309.01885, and CDQuant, arXiv 2406.17542, use the same step).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from roundwise.core.grid import MAX_SCALE, MIN_SCALE
from roundwise.core.quantized import QuantizedWeight

#: Columns updated between two matrix products with the whole Hessian.
PANEL = 128


@dataclass
class Refiner:
    """Codes and scales of one weight while they are being improved; everything in channel order.

    T target [out, in]; H damped Hessian [in, in]; codes floats [out, in]; scale, zero [out, groups];
    g_idx int64 [in].
    """

    T: torch.Tensor
    H: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    g_idx: torch.Tensor
    maxq: int

    def dequantize(self) -> torch.Tensor:
        """Q [out, in]."""
        return (self.codes - self.zero[:, self.g_idx]) * self.scale[:, self.g_idx]

    def loss(self) -> torch.Tensor:
        """(Q - T) Ĥ (Q - T)ᵀ of each row, [out]."""
        E = self.dequantize() - self.T
        return ((E @ self.H) * E).sum(dim=1)

    def refit(self) -> None:
        """Codes fixed, the best scales of each row: s = M⁻¹ b, kept where the row's loss falls.

        With V = codes - zeros: M[g, h] = Σ_{i in g, k in h} V_i Ĥ_ik V_k, b[g] = Σ_{i in g} V_i (T Ĥ)_i.
        """
        V = self.codes - self.zero[:, self.g_idx]
        rows, groups = self.scale.shape
        b = V.new_zeros(rows, groups).index_add_(1, self.g_idx, V * (self.T @ self.H))
        M = V.new_zeros(rows, groups, groups)
        for group in range(groups):
            members = (self.g_idx == group).nonzero().flatten()
            M[:, group].index_add_(1, self.g_idx, (V[:, members] @ self.H[members]) * V)
        # A group whose codes all sit on the zero point has no say in the loss: keep its scale.
        silent = M.diagonal(dim1=1, dim2=2) <= 0
        M.diagonal(dim1=1, dim2=2)[silent] = 1.0
        b = torch.where(silent, self.scale, b)
        fitted, failed = torch.linalg.solve_ex(M, b)
        stored = fitted.sign() * fitted.abs().clamp(MIN_SCALE, MAX_SCALE)
        stored = stored.to(torch.float16).to(fitted.dtype)

        def loss(s: torch.Tensor) -> torch.Tensor:
            return ((M @ s[:, :, None])[:, :, 0] * s).sum(dim=1) - 2 * (b * s).sum(dim=1)

        # A scale keeps its sign: a symmetric range turned around would be another grid.
        same_sign = (stored.sign() == self.scale.sign()).all(dim=1) & torch.isfinite(stored).all(
            dim=1
        )
        better = same_sign & (failed == 0) & (loss(stored) < loss(self.scale))
        self.scale = torch.where(better[:, None], stored, self.scale)

    def descend(self) -> None:
        """One sweep over the columns: each weight to its best grid point, all others fixed."""
        G = (self.dequantize() - self.T) @ self.H
        width = self.codes.shape[1]
        Gt, Ct = G.T.contiguous(), self.codes.T.contiguous()
        St, Zt = self.scale.T.contiguous(), self.zero.T.contiguous()
        for a in range(0, width, PANEL):
            b = min(a + PANEL, width)
            change = torch.zeros_like(Gt[a:b])
            for j in range(a, b):
                scale, zero = St[self.g_idx[j]], Zt[self.g_idx[j]]
                q = (Ct[j] - zero) * scale
                best = ((q - Gt[j] / self.H[j, j]) / scale).round_().add_(zero).clamp_(0, self.maxq)
                moved = (best - Ct[j]) * scale
                Ct[j] = best
                change[j - a] = moved
                if j + 1 < b:
                    Gt[j + 1 : b].addr_(self.H[j + 1 : b, j], moved)
            Gt[b:].addmm_(self.H[b:, a:b], change)
        self.codes = Ct.T.contiguous()


def refine(
    q: QuantizedWeight,
    T: torch.Tensor,
    H: torch.Tensor,
    *,
    rounds: int,
    keep_scales: bool,
) -> QuantizedWeight:
    """`rounds` times the scales and then the codes of a solved weight.

    Args:
        q: the weight as solved.
        T: target [out, in].
        H: damped Hessian [in, in], as it was factored.
        rounds: repetitions.
        keep_scales: only the codes are improved.
    """
    state = Refiner(
        T, H, q.codes.to(T.dtype), q.scales.to(T.dtype), q.zeros.to(T.dtype),
        q.g_idx.long(), 2**q.bits - 1,
    )  # fmt: skip
    for _ in range(rounds):
        if not keep_scales:
            state.refit()
        state.descend()
    return replace(q, codes=state.codes.to(torch.uint8), scales=state.scale.to(torch.float16))
