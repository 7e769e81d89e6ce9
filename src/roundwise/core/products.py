"""Products of matrices as the solver needs them: many, in float32, often of a wide and a narrow one.

On the CPU the extension's are used: as fast as torch's where those use the widest vectors, twice as fast
where they do not (on AMD), and with narrow matrices everywhere.
"""

from __future__ import annotations

import torch

from roundwise.core import native

#: Entries of the answer times the length of the sums, below which a call costs more than the product.
WORTH = 1 << 18
#: Columns of a triangular matrix that are solved one after another.
PANEL = 128
#: Columns of a Cholesky factor between two updates of the rest.
WIDE_PANEL = 192


def product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A @ B of A [m, k] and B [k, n], in their dtype."""
    if not _natively(A, B):
        return A @ B
    C = B.new_zeros(len(A), B.shape[1])
    add_product(C, A, B)
    return C


def add_product(C: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float = 1.0) -> None:
    """C += scale · A @ B of C [m, n], A [m, k] and B [k, n], all in one dtype."""
    if not _natively(A, B) or C.stride(1) != 1:
        C.add_(A @ B, alpha=scale)
        return
    B = B if B.stride(1) == 1 else B.contiguous()
    if A.stride(1) != 1 and A.stride(0) == 1:
        native.add_moment(C, A.T, B, scale=scale)
    else:
        A = A if A.stride(1) == 1 else A.contiguous()
        native.add_moment(C, A, B, turned=True, scale=scale)


def _natively(A: torch.Tensor, B: torch.Tensor) -> bool:
    worth = len(A) * len(B) * B.shape[1] >= WORTH
    return worth and native.usable(A) and A.dtype == B.dtype == torch.float32


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
    add_product(B[last], M[last, first], B[first], -1.0)
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
    if not (native.usable(A) and A.dtype == torch.float32):
        _turn(A)
        if not _cholesky(A):
            return False
        _turn(A)
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
            native.add_moment(A[:a, :a], right, right, lower=True, scale=-1.0)
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


def _turn(A: torch.Tensor) -> None:
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
