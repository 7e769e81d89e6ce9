"""Damping, and the reverse Cholesky factor of the Hessian: H = U D Uᵀ with U unit upper triangular.

The published recursion takes the Cholesky factor of H⁻¹, which costs three factorisation-sized
steps. Factored from its last row to the first, H itself gives the same column ratios in one: R is
upper triangular with H = R Rᵀ; U = R / diag R, D = diag(R)².

Products of matrices as the solver needs them: many, in float32, often of a wide and a narrow one.

On the CPU the extension's are used: as fast as torch's where those use the widest vectors, twice as fast
where they do not (on AMD), and with narrow matrices everywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from roundwise.core.act_order import is_identity
from roundwise.core.backends import cpp
from roundwise.errors import NumericalError, SingularError

#: Entries of the answer times the length of the sums, below which a call costs more than the product.
WORTH = 1 << 18
#: Columns of a triangular matrix that are solved one after another.
PANEL = 128
#: Columns of a Cholesky factor between two updates of the rest.
WIDE_PANEL = 192


def matmul(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A @ B of A [m, k] and B [k, n], in their dtype."""
    if not _uses_native(A, B):
        return A @ B
    C = B.new_zeros(len(A), B.shape[1])
    add_matmul(C, A, B)
    return C


def add_matmul(C: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float = 1.0) -> None:
    """C += scale · A @ B of C [m, n], A [m, k] and B [k, n], all in one dtype."""
    if not _uses_native(A, B) or C.stride(1) != 1:
        C.add_(A @ B, alpha=scale)
        return
    B = B if B.stride(1) == 1 else B.contiguous()
    if A.stride(1) != 1 and A.stride(0) == 1:
        cpp.add_moment(C, A.T, B, scale=scale)
    else:
        A = A if A.stride(1) == 1 else A.contiguous()
        cpp.add_moment(C, A, B, transposed=True, scale=scale)


def _uses_native(A: torch.Tensor, B: torch.Tensor) -> bool:
    worth = len(A) * len(B) * B.shape[1] >= WORTH
    return worth and cpp.usable(A) and A.dtype == B.dtype == torch.float32


def solve_triangular(
    M: torch.Tensor, B: torch.Tensor, *, upper: bool, unit: bool = True
) -> torch.Tensor:
    """M⁻¹ B of M [n, n], triangular, and B [n, k], in place; B is returned.

    By halves: what the one asks of the other is one product, as large as can be.

    Args:
        upper: which half of M counts.
        unit: its diagonal is one.
    """
    if len(M) <= PANEL:
        return B.copy_(_by_columns(M, B, upper=upper, unit=unit))
    half = -(-len(M) // (2 * PANEL)) * PANEL
    first, last = slice(half), slice(half, None)
    if upper:
        first, last = last, first
    solve_triangular(M[first, first], B[first], upper=upper, unit=unit)
    add_matmul(B[last], M[last, first], B[first], -1.0)
    solve_triangular(M[last, last], B[last], upper=upper, unit=unit)
    return B


def _by_columns(
    M: torch.Tensor, B: torch.Tensor, *, upper: bool, unit: bool = False
) -> torch.Tensor:
    """M⁻¹ B by LAPACK, whose matrices lie by columns: Bᵀ is such a one, B would be copied twice."""
    found = torch.linalg.solve_triangular(
        M.T, B.T, upper=not upper, left=False, unitriangular=unit
    ).T
    assert isinstance(found, torch.Tensor)
    return found


def reverse_cholesky(A: torch.Tensor) -> bool:
    """Replaces A [n, n], symmetric, by R, upper triangular with A = R Rᵀ; False if it is indefinite.

    A is lost then. In panels from the last, whose update of the rest is the extension's symmetric sum,
    where that is at hand.
    """
    if not (cpp.usable(A) and A.dtype == torch.float32):
        _flip_both_axes(A)
        if not _cholesky(A):
            return False
        _flip_both_axes(A)
        return True
    for b in range(len(A), 0, -WIDE_PANEL):
        a = max(b - WIDE_PANEL, 0)
        # Of what is left the lower half is up to date: turned around, the upper one.
        L, failed = torch.linalg.cholesky_ex(A[a:b, a:b].flip(0, 1), upper=True)
        if int(failed):
            return False
        R = L.T.flip(0, 1)
        if a:
            right = _by_columns(R, A[a:b, :a], upper=True).contiguous()
            cpp.add_moment(A[:a, :a], right, right, lower=True, scale=-1.0)
            A[:a, a:b] = right.T
            A[a:b, :a] = 0
        A[a:b, a:b] = R
    return True


def _cholesky(A: torch.Tensor) -> bool:
    """Replaces A by its lower Cholesky factor; False if it is indefinite."""
    if A.device.type == "cpu":
        # A is symmetric, so its transpose is the column-major matrix that LAPACK works on in place.
        failed = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(A.mT, upper=True, out=(A.mT, failed))
        return not int(failed)
    L, failed = torch.linalg.cholesky_ex(A.mT, upper=True)
    A.mT.copy_(L)
    return not int(failed)


def _flip_both_axes(A: torch.Tensor) -> None:
    """Flips a square matrix in both axes, in place: a copy would be as large as H."""
    width = len(A)
    middle = width // 2
    for a in range(0, middle, WIDE_PANEL):
        b = min(a + WIDE_PANEL, middle)
        front = A[a:b].flip(0, 1)
        A[a:b] = A[width - b : width - a].flip(0, 1)
        A[width - b : width - a] = front
    if width % 2:
        A[middle] = A[middle].flip(0)


#: Largest damping tried: beyond it the result is rounding to nearest in all but name.
MAX_DAMP = 10.0
#: Columns of a matrix product; U is triangular, so products in panels do half the work.
FACTOR_PANEL = 256


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
        for a in range(0, len(Xt), FACTOR_PANEL):
            b = min(a + FACTOR_PANEL, len(Xt))
            part = matmul(self.U[:b, a:b].T, Xt[:b])
            total += float(self.D[a:b] @ part.square_().sum(dim=1))
        return total

    def solve(self, Yt: torch.Tensor) -> torch.Tensor:
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
    if not all_finite(H):
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
    if is_identity(order):
        return H.clone()
    R = torch.empty_like(H)
    for a in range(0, len(H), FACTOR_PANEL):
        rows = H.index_select(0, order[a : a + FACTOR_PANEL])
        torch.index_select(rows, 1, order, out=R[a : a + FACTOR_PANEL])
    return R


def all_finite(A: torch.Tensor) -> bool:
    """No NaN or infinity in a matrix: either would make a sum one.

    Finite numbers may overflow float32: then in float64, in parts, for small temporaries.
    """
    if A.dtype in (torch.float32, torch.float64) and math.isfinite(float(A.sum())):
        return True
    parts = (A[start : start + FACTOR_PANEL] for start in range(0, len(A), FACTOR_PANEL))
    return all(math.isfinite(float(part.sum(dtype=torch.float64))) for part in parts)
