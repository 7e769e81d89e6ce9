"""Linear algebra of the solver: matrix products, triangular systems, damping, the factor of the Hessian.

The factor is H = U D Uᵀ with U unit upper triangular. The published recursion takes the Cholesky factor
of H⁻¹, which costs three steps of the size of a factorization. Factored from its last row to the first,
H itself gives the same ratios between columns in one: R is upper triangular with H = R Rᵀ;
U = R / diag R, D = diag(R)².

Products are many, in float32, often of a wide and a narrow matrix. On the CPU those of the extension are
used: as fast as torch's where torch uses the widest vectors, twice as fast where it does not (on AMD),
and faster with narrow matrices everywhere.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from roundwise.core.backends import cpp
from roundwise.errors import NumericalError, SingularError

#: Smallest product (entries of the result times length of the sums) that the extension computes: below
#: it, the call costs more than the product.
MIN_PRODUCT = 1 << 18
#: Largest triangular matrix that is solved at once, in columns.
TRIANGLE_PANEL = 128
#: Columns of a Cholesky factor between two updates of the rest.
CHOLESKY_PANEL = 192
#: Rows of a matrix that are copied, summed up or multiplied at a time.
ROW_PANEL = 256
#: Largest damping tried: beyond it the result is rounding to nearest in all but name.
MAX_DAMP = 10.0


def permuted_columns(W: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Returns the columns of W [rows, in] in an order, each contiguous: [in, rows]."""
    # A copy, also of a single row: what it is solved with works in place.
    columns = W.T.clone(memory_format=torch.contiguous_format)
    return columns if is_identity(order) else columns.index_select(0, order)


def is_identity(order: torch.Tensor) -> bool:
    """Returns whether this order [in] changes nothing."""
    return bool((order[1:] > order[:-1]).all())


def matmul(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Returns A @ B for A [m, k] and B [k, n], in their dtype."""
    if _extension_for(A, B) is None:
        return A @ B
    C = B.new_zeros(len(A), B.shape[1])
    add_matmul(C, A, B)
    return C


def add_matmul(C: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float = 1.0) -> None:
    """Adds scale · A @ B to C in place, for C [m, n], A [m, k] and B [k, n] of one dtype."""
    extension = _extension_for(A, B)
    if extension is None or C.stride(1) != 1:
        C.add_(A @ B, alpha=scale)
        return
    B, threads = B if B.stride(1) == 1 else B.contiguous(), torch.get_num_threads()
    # The extension multiplies Aᵀ B, or A B if its fifth argument is true.
    if A.stride(1) != 1 and A.stride(0) == 1:
        extension.moment(A.T, B, C, False, False, scale, threads)
    else:
        A = A if A.stride(1) == 1 else A.contiguous()
        extension.moment(A, B, C, False, True, scale, threads)


def _extension_for(A: torch.Tensor, B: torch.Tensor) -> Any:
    """Returns the C++ extension where it multiplies these two, else None."""
    pays = len(A) * len(B) * B.shape[1] >= MIN_PRODUCT
    return cpp.load()[0] if pays and A.dtype == B.dtype and _is_float32_on_cpu(A) else None


def _is_float32_on_cpu(A: torch.Tensor) -> bool:
    """Returns whether the extension takes matrices like A."""
    return A.dtype == torch.float32 and A.device.type == "cpu"


def solve_triangular(
    M: torch.Tensor, B: torch.Tensor, *, upper: bool, unit: bool = True
) -> torch.Tensor:
    """Replaces B by M⁻¹ B, in place, and returns it.

    Works by halves, so that the update of the second half is one large product.

    Args:
        M: [n, n], triangular; the other triangle is not read.
        B: [n, k].
        upper: M is upper triangular, else lower.
        unit: the diagonal of M counts as one.
    """
    if len(M) <= TRIANGLE_PANEL:
        return B.copy_(_solve_small(M, B, upper=upper, unit=unit))
    half = -(-len(M) // (2 * TRIANGLE_PANEL)) * TRIANGLE_PANEL
    first, last = slice(half), slice(half, None)
    if upper:
        first, last = last, first
    solve_triangular(M[first, first], B[first], upper=upper, unit=unit)
    add_matmul(B[last], M[last, first], B[first], -1.0)
    solve_triangular(M[last, last], B[last], upper=upper, unit=unit)
    return B


def _solve_small(
    M: torch.Tensor, B: torch.Tensor, *, upper: bool, unit: bool = False
) -> torch.Tensor:
    """Returns M⁻¹ B, from LAPACK. Its matrices are column-major, as Bᵀ is; B would be copied twice."""
    X = torch.linalg.solve_triangular(M.T, B.T, upper=not upper, left=False, unitriangular=unit).T
    assert isinstance(X, torch.Tensor)
    return X


def reverse_cholesky(A: torch.Tensor) -> bool:
    """Replaces A [n, n], symmetric, by R, upper triangular with A = R Rᵀ.

    With the extension, in panels from the last to the first: the update of the columns before a panel is
    a symmetric product, of which only half is computed. Otherwise by LAPACK.

    Returns:
        False if A is indefinite; its contents are then undefined.
    """
    if not (_is_float32_on_cpu(A) and cpp.load()[0] is not None):
        _flip_both_axes(A)
        if not _cholesky(A):
            return False
        _flip_both_axes(A)
        return True
    for b in range(len(A), 0, -CHOLESKY_PANEL):
        a = max(b - CHOLESKY_PANEL, 0)
        # Only the lower triangle of the rest is up to date; flipped in both axes, it is the upper one.
        L, info = torch.linalg.cholesky_ex(A[a:b, a:b].flip(0, 1), upper=True)
        if int(info):
            return False
        R = L.T.flip(0, 1)
        if a:
            right = _solve_small(R, A[a:b, :a], upper=True).contiguous()
            cpp.add_moment(A[:a, :a], right, right, lower=True, scale=-1.0)
            A[:a, a:b] = right.T
            A[a:b, :a] = 0
        A[a:b, a:b] = R
    return True


def _cholesky(A: torch.Tensor) -> bool:
    """Replaces A, symmetric, by its lower Cholesky factor; returns False if it is indefinite."""
    if A.device.type == "cpu":
        # A is symmetric, so its transpose is the column-major matrix that LAPACK works on in place.
        info = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(A.mT, upper=True, out=(A.mT, info))
        return not int(info)
    L, info = torch.linalg.cholesky_ex(A.mT, upper=True)
    A.mT.copy_(L)
    return not int(info)


def _flip_both_axes(A: torch.Tensor) -> None:
    """Flips a square matrix in both axes, in place: a copy would be as large as H."""
    width = len(A)
    middle = width // 2
    for a in range(0, middle, CHOLESKY_PANEL):
        b = min(a + CHOLESKY_PANEL, middle)
        front = A[a:b].flip(0, 1)
        A[a:b] = A[width - b : width - a].flip(0, 1)
        A[width - b : width - a] = front
    if width % 2:
        A[middle] = A[middle].flip(0)


class Factor(NamedTuple):
    """Ĥ = H + damp·mean(diag H)·I = U diag(D) Uᵀ, rows and columns in processing order."""

    U: torch.Tensor
    """[in, in], unit upper triangular."""
    D: torch.Tensor
    """[in], the pivots, positive: cost of a squared error in a column after later columns compensate."""
    shift: float
    """Number added to the diagonal: damp·mean(diag H)."""
    damp_percent: float
    """The damping that succeeded."""
    tried: tuple[float, ...]
    """Every damping tried, in order."""

    def quadratic(self, Xt: torch.Tensor) -> float:
        """Returns tr(X Ĥ Xᵀ) = Σ_j D_j ||(X U)_j||² for Xt = Xᵀ [in, rows] in processing order.

        In panels: U is triangular, so that half of the product is left out.
        """
        total = 0.0
        for a in range(0, len(Xt), ROW_PANEL):
            b = min(a + ROW_PANEL, len(Xt))
            part = matmul(self.U[:b, a:b].T, Xt[:b])
            total += float(self.D[a:b] @ part.square_().sum(dim=1))
        return total

    def solve(self, Yt: torch.Tensor) -> torch.Tensor:
        """Replaces Yt = Yᵀ [in, rows], in processing order, by Ĥ⁻¹ Yᵀ, in place, and returns it."""
        solve_triangular(self.U, Yt, upper=True).div_(self.D[:, None])
        return solve_triangular(self.U.T, Yt, upper=False)


def factor(H: torch.Tensor, perm: torch.Tensor, damp_percent: float) -> Factor:
    """Damps and factors H; raises the damping tenfold (at least to 1e-4) while H is indefinite.

    Args:
        H: [in, in], symmetric; not changed.
        perm: int64 [in], the processing order; U and D are in this order.
        damp_percent: first damping tried, as a part of mean(diag H).

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
    """Returns H with rows and columns in another order; by panels, four times as fast as at once."""
    if is_identity(order):
        return H.clone()
    R = torch.empty_like(H)
    for a in range(0, len(H), ROW_PANEL):
        rows = H.index_select(0, order[a : a + ROW_PANEL])
        torch.index_select(rows, 1, order, out=R[a : a + ROW_PANEL])
    return R


def all_finite(A: torch.Tensor) -> bool:
    """Returns whether a matrix has no NaN or infinity: with one, the sum of all entries is not finite.

    A sum that is not finite is taken again in float64: finite numbers may overflow float32.
    """
    if A.dtype in (torch.float32, torch.float64) and math.isfinite(float(A.sum())):
        return True
    parts = (A[start : start + ROW_PANEL] for start in range(0, len(A), ROW_PANEL))
    return all(math.isfinite(float(part.sum(dtype=torch.float64))) for part in parts)
