"""Products, triangular systems and factors are those in float64, with the extension and without."""

from __future__ import annotations

import pytest
import torch

from roundwise.core import linalg
from roundwise.core.linalg import (
    TRIANGLE_PANEL,
    factor,
    matmul,
    reverse_cholesky,
    solve_triangular,
)
from roundwise.errors import NumericalError, SingularError
from tests.core.native import SETS, using
from tests.core.oracle import damped
from tests.core.problems import layer

#: None: plain torch.
WAYS = [None, *SETS]


def matrix(rows: int, columns: int, *, transposed: bool = False) -> torch.Tensor:
    """Part of a larger matrix, so that rows do not follow one another without a gap."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    shape = (columns + 1, rows + 3) if transposed else (rows + 1, columns + 3)
    whole = torch.randn(shape, generator=generator)
    return whole[:columns, :rows].T if transposed else whole[:rows, :columns]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (5, 700, 90), (193, 300, 33), (40, 257, 700), (1, 4000, 300)]
)
def test_a_product_is_that_of_the_matrices(
    way: str | None, transposed: tuple[bool, bool], m: int, k: int, n: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(linalg, "MIN_PRODUCT", 0)
    A, B = matrix(m, k, transposed=transposed[0]), matrix(k, n, transposed=transposed[1])
    with using(way):
        found = matmul(A, B)
    torch.testing.assert_close(found.double(), A.double() @ B.double(), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("way", WAYS)
def test_a_product_of_doubles_is_one(way: str | None) -> None:
    A, B = matrix(200, 300).double(), matrix(300, 100).double()
    with using(way):
        torch.testing.assert_close(matmul(A, B), A @ B, rtol=1e-13, atol=1e-12)


WIDTHS = pytest.mark.parametrize(
    "width", [1, TRIANGLE_PANEL, TRIANGLE_PANEL + 1, 5 * TRIANGLE_PANEL - 3]
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("unit", [False, True])
@WIDTHS
def test_triangular_systems_are_solved(
    way: str | None, upper: bool, unit: bool, width: int
) -> None:
    whole = 0.05 * matrix(width, width)
    whole.diagonal().copy_(torch.linspace(1.0, 2.0, width))
    B = matrix(width, 50)
    given = B.clone()
    with using(way):
        X = solve_triangular(whole, B, upper=upper, unit=unit)
    assert X is B
    M = whole.triu() if upper else whole.tril()
    if unit:
        M.diagonal().fill_(1.0)
    torch.testing.assert_close(M.double() @ X.double(), given.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@WIDTHS
def test_the_reverse_factor_times_its_transpose_is_the_matrix(way: str | None, width: int) -> None:
    X = matrix(2 * width, width)
    A = X.T @ X / width + torch.eye(width)
    R = A.clone()
    with using(way):
        assert reverse_cholesky(R)
        indefinite = A.clone()
        indefinite[width // 2, width // 2] = -1.0
        assert not reverse_cholesky(indefinite)
    assert torch.equal(R, R.triu())
    torch.testing.assert_close(R.double() @ R.double().T, A.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_of_a_hessian(way: str | None, dtype: torch.dtype) -> None:
    """Ĥ = U D Uᵀ in the order given; H itself is not changed."""
    _, H = layer(0, rows=1, width=300)
    given, perm = H.to(dtype), torch.randperm(300, generator=torch.Generator().manual_seed(0))
    with using(way):
        F = factor(given, perm, 0.01)
    assert torch.equal(given, H.to(dtype))
    assert torch.equal(F.U, F.U.triu())
    assert torch.equal(F.U.diagonal(), torch.ones(300, dtype=dtype))
    U, D = F.U.double(), F.D.double()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    expected = damped(H, 0.01)[perm][:, perm]
    scale = float(expected.diagonal().mean())
    torch.testing.assert_close(U * D @ U.T / scale, expected / scale, rtol=0, atol=tolerance)
    assert (F.damp_percent, F.tried) == (0.01, (0.01,))


@pytest.mark.parametrize("way", WAYS)
def test_quadratic_forms_and_systems_of_a_factor(way: str | None) -> None:
    W, H = layer(1, rows=7, width=300)
    perm = torch.arange(300)
    with using(way):
        F = factor(H, perm, 0.01)
        loss, X = F.quadratic(W.T.contiguous()), F.solve(W.T.contiguous())
    full = damped(H, 0.01)
    assert loss == pytest.approx(float(((W @ full) * W).sum()), rel=1e-10)
    torch.testing.assert_close(full @ X, W.T, rtol=1e-7, atol=1e-9)


def test_damping_is_raised_until_the_hessian_is_definite() -> None:
    H = torch.diag(torch.tensor([-0.5, 1.0, 1.0, 1.0]))  # a mean of 0.625
    F = factor(H, torch.arange(4), 0.01)
    assert F.tried == pytest.approx((0.01, 0.1, 1.0))
    assert F.shift == pytest.approx(0.625)
    with pytest.raises(SingularError, match="indefinite even with damping 10"):
        factor(torch.diag(torch.tensor([-40.0, 41.0])), torch.arange(2), 1.0)


def test_hessians_without_a_factor_are_errors() -> None:
    with pytest.raises(SingularError, match="no calibration input"):
        factor(torch.zeros(4, 4), torch.arange(4), 0.01)
    with pytest.raises(NumericalError, match="Hessian"):
        factor(torch.full((4, 4), float("nan")), torch.arange(4), 0.01)


def test_large_finite_numbers_are_finite() -> None:
    A = torch.full((300, 4), 3e38)  # their sum overflows float32
    assert linalg.all_finite(A)
    A[299, 3] = float("inf")
    assert not linalg.all_finite(A)
