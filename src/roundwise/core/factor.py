"""Damping, and the reverse Cholesky factor of the Hessian: H = U D Uᵀ with U unit upper triangular.

The published recursion takes the Cholesky factor of H⁻¹, which costs three factorisation-sized
steps. Factored from its last row to the first, H itself gives the same column ratios in one: R is
upper triangular with H = R Rᵀ; U = R / diag R, D = diag(R)².
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from roundwise.core.order import in_order
from roundwise.core.products import product, reverse_cholesky, solve_triangular
from roundwise.errors import NumericalError, SingularError

#: Largest damping tried: beyond it the result is rounding to nearest in all but name.
MAX_DAMP = 10.0
#: Columns of a matrix product; U is triangular, so products in panels do half the work.
PANEL = 256


class Factor(NamedTuple):
    """H + damp·mean(diag H)·I = U diag(D) Uᵀ."""

    U: torch.Tensor
    """[in, in], unit upper triangular."""
    D: torch.Tensor
    """[in], positive: what an error in a column costs once later columns have made up for it."""
    shift: float
    """What was added to the diagonal."""
    damp_percent: float
    """The damping that succeeded."""
    tried: tuple[float, ...]
    """Every damping tried, in order."""

    def quadratic(self, Xt: torch.Tensor) -> float:
        """tr(X Ĥ Xᵀ) = Σ_j D_j ||(X U)_j||² for Xt = Xᵀ [in, rows] in processing order."""
        total = 0.0
        for a in range(0, len(Xt), PANEL):
            b = min(a + PANEL, len(Xt))
            part = product(self.U[:b, a:b].T, Xt[:b])
            total += float(self.D[a:b] @ part.square_().sum(dim=1))
        return total

    def divide(self, Yt: torch.Tensor) -> torch.Tensor:
        """Ĥ⁻¹ Yᵀ for Yt = Yᵀ [in, rows] in processing order, in place; it is returned."""
        solve_triangular(self.U, Yt, upper=True).div_(self.D[:, None])
        return solve_triangular(self.U.T, Yt, upper=False)


def factor(H: torch.Tensor, perm: torch.Tensor, damp_percent: float) -> Factor:
    """Damps and factors H, raising the damping tenfold (at least to 1e-4) while it is indefinite.

    Args:
        H: [in, in], symmetric; not changed.
        perm: int64 [in], the processing order; U and D are in this order.
        damp_percent: damping to start with, as a part of mean(diag H).

    Raises:
        SingularError: H is zero, or stays indefinite up to `MAX_DAMP`.
        NumericalError: H is not finite.
    """
    if not finite(H):
        raise NumericalError("NaN or infinity in the Hessian")
    mean = float(H.diagonal().mean())
    if mean <= 0.0:
        raise SingularError("the Hessian is zero: no calibration input reached this layer")
    tried: list[float] = []
    damp = damp_percent
    while damp <= MAX_DAMP:
        tried.append(damp)
        R = _reordered(H, perm)
        R.diagonal().add_(damp * mean)
        definite = reverse_cholesky(R)
        root = R.diagonal().clone()
        if definite and bool(torch.isfinite(root).all()) and float(root.min()) > 0.0:
            return Factor(R.div_(root), root.square(), damp * mean, damp, tuple(tried))
        damp = max(10 * damp, 1e-4)
    raise SingularError(f"the Hessian is indefinite even with damping {tried[-1]:g}")


def _reordered(H: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """H with rows and columns in another order, copied panel by panel: four times as fast as at once."""
    if in_order(order):
        return H.clone()
    R = torch.empty_like(H)
    for a in range(0, len(H), PANEL):
        rows = H.index_select(0, order[a : a + PANEL])
        torch.index_select(rows, 1, order, out=R[a : a + PANEL])
    return R


def finite(A: torch.Tensor) -> bool:
    """No NaN or infinity in a matrix: either would make a sum one.

    Finite numbers may overflow float32: then in float64, in parts, for small temporaries.
    """
    if A.dtype in (torch.float32, torch.float64) and math.isfinite(float(A.sum())):
        return True
    parts = (A[start : start + PANEL] for start in range(0, len(A), PANEL))
    return all(math.isfinite(float(part.sum(dtype=torch.float64))) for part in parts)
