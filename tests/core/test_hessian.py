"""The Hessian is the mean of xxᵀ over the tokens that count, whatever the dtype and the batches."""

from __future__ import annotations

import pytest
import torch

from roundwise import Hessian
from roundwise.core import hessian
from roundwise.errors import NumericalError


@pytest.mark.parametrize("width", [7, 64, 1100])
def test_equals_the_plain_product(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "TILE", 512)
    X = torch.randn(3, 50, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = Hessian(width, dtype=torch.float64)
    for batch in X:
        H.add(batch)
    rows = X.reshape(-1, width)
    assert H.tokens == 150
    torch.testing.assert_close(H.mean(), rows.T @ rows / 150)


def test_bfloat16_inputs_are_summed_in_float32() -> None:
    X = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    H = Hessian(32)
    for batch in X.split(256):
        H.add(batch)
    exact = X.double().T @ X.double() / 4096
    torch.testing.assert_close(H.mean().double(), exact, rtol=1e-4, atol=1e-5)


def test_padding_does_not_count() -> None:
    X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    X[~mask] = float("nan")  # not even this
    H = Hessian(8)
    H.add(X, mask)
    rows = X[mask]
    assert H.tokens == 8
    torch.testing.assert_close(H.mean(), rows.T @ rows / 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_bad_values_are_found_at_once(value: float) -> None:
    X = torch.zeros(4, 8)
    X[2, 5] = value
    with pytest.raises(NumericalError, match="channel 5"):
        Hessian(8).add(X)


def test_no_token_gives_zeros() -> None:
    assert Hessian(4).mean().abs().max() == 0
