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


def product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A @ B of A [m, k] and B [k, n], in their dtype."""
    worth = len(A) * len(B) * B.shape[1] >= WORTH
    if not (worth and native.usable(A) and A.dtype == B.dtype == torch.float32):
        return A @ B
    C = B.new_zeros(len(A), B.shape[1])
    B = B if B.stride(1) == 1 else B.contiguous()
    if A.stride(1) != 1 and A.stride(0) == 1:
        native.add_moment(C, A.T, B)
    else:
        native.add_moment(C, A if A.stride(1) == 1 else A.contiguous(), B, turned=True)
    return C


def solve_unit(U: torch.Tensor, B: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
    """U⁻¹ B, or U⁻ᵀ B, of U [n, n], unit upper triangular, and B [n, k], in place; B is returned.

    By halves: what the one asks of the other is one product, as large as can be.
    """
    if len(U) <= PANEL:
        block = U.T if transposed else U
        part = torch.linalg.solve_triangular(block, B, upper=not transposed, unitriangular=True)
        return B.copy_(part)
    half = -(-len(U) // (2 * PANEL)) * PANEL
    first, last = slice(half), slice(half, None)
    across = U[first, last]
    if transposed:
        solve_unit(U[first, first], B[first], transposed=True)
        B[last] -= product(across.T, B[first])
        solve_unit(U[last, last], B[last], transposed=True)
    else:
        solve_unit(U[last, last], B[last])
        B[first] -= product(across, B[last])
        solve_unit(U[first, first], B[first])
    return B
