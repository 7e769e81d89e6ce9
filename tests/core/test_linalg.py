"""The solver's products are those in float64, however matrices lie, with the extension and without."""

from __future__ import annotations

import pytest
import torch

from roundwise.core import linalg
from roundwise.core.linalg import PANEL, matmul, reverse_cholesky, solve_triangular
from tests.core.backends.test_cpp import SETS, using

#: None: plain torch.
WAYS = [None, *SETS]


def matrix(rows: int, columns: int, *, turned: bool = False) -> torch.Tensor:
    """Part of a larger matrix, so that rows do not follow one another without a gap."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    shape = (columns + 1, rows + 3) if turned else (rows + 1, columns + 3)
    whole = torch.randn(shape, generator=generator)
    return whole[:columns, :rows].T if turned else whole[:rows, :columns]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (5, 700, 90), (193, 300, 33), (40, 257, 700), (1, 4000, 300)]
)
def test_a_product_is_that_of_the_matrices(
    way: str | None, turned: tuple[bool, bool], m: int, k: int, n: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(linalg, "WORTH", 0)
    A, B = matrix(m, k, turned=turned[0]), matrix(k, n, turned=turned[1])
    with using(way):
        found = matmul(A, B)
    torch.testing.assert_close(found.double(), A.double() @ B.double(), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("way", WAYS)
def test_a_product_of_doubles_is_one(way: str | None) -> None:
    A, B = matrix(200, 300).double(), matrix(300, 100).double()
    with using(way):
        torch.testing.assert_close(matmul(A, B), A @ B, rtol=1e-13, atol=1e-12)


WIDTHS = pytest.mark.parametrize("width", [1, PANEL, PANEL + 1, 5 * PANEL - 3])


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
