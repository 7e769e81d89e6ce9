"""Damping, and the reverse Cholesky factor of the Hessian: H = U D Uᵀ with U unit upper triangular.

The published recursion takes the Cholesky factor of H⁻¹, which costs three factorisation-sized
steps. Flipping H in both axes, factoring and flipping back gives the same column ratios from one:
flip(H) = L Lᵀ, R = flip(L) is upper triangular with H = R Rᵀ; U = R / diag R, D = diag(R)².
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from roundwise.errors import NumericalError, SingularError

#: Largest damping tried: beyond it the result is rounding to nearest in all but name.
MAX_DAMP = 10.0


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


def factor(H: torch.Tensor, damp_percent: float) -> Factor:
    """Damps and factors H, raising the damping tenfold (at least to 1e-4) while it is indefinite.

    Args:
        H: [in, in], symmetric, in processing order. Overwritten.
        damp_percent: damping to start with, as a part of mean(diag H).

    Raises:
        SingularError: H is zero, or stays indefinite up to `MAX_DAMP`.
        NumericalError: H is not finite.
    """
    mean = float(H.diagonal().mean())
    if not torch.isfinite(torch.tensor(mean)):
        raise NumericalError("the Hessian is not finite")
    if mean <= 0.0:
        raise SingularError("the Hessian is zero: no calibration input reached this layer")
    diagonal = H.diagonal().clone()
    tried: list[float] = []
    damp = damp_percent
    while damp <= MAX_DAMP:
        tried.append(damp)
        H.diagonal().copy_(diagonal + damp * mean)
        L, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
        if not int(failed):
            R = L.flip(0, 1)
            del L
            root = R.diagonal().clone()
            if bool(torch.isfinite(root).all()) and float(root.min()) > 0.0:
                return Factor(R.div_(root), root.square(), damp * mean, damp, tuple(tried))
        damp = max(10 * damp, 1e-4)
    raise SingularError(
        f"the Hessian is indefinite even with damping {tried[-1] if tried else damp:g}"
    )
