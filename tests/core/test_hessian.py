"""The Hessian is the mean of xxᵀ over all tokens but padding, whatever the dtype and the batches."""

from __future__ import annotations

import pytest
import torch

from roundwise import Hessian, QuantizeConfig, solve
from roundwise.core import hessian
from roundwise.core.hessian import CrossMoment
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


def test_padding_is_skipped() -> None:
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


def test_a_mean_is_a_copy_or_takes_the_sum() -> None:
    X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    H = Hessian(8)
    H.add(X[0])
    H.mean().zero_()  # the sum goes on
    H.add(X[1])
    both = H.mean()
    torch.testing.assert_close(both, torch.einsum("bti,btj->ij", X, X) / 10)
    assert torch.equal(H.take_mean(), both)
    assert H.sum.numel() == 0


def test_bfloat16_inputs_hardly_change_the_loss() -> None:
    """H from inputs rounded to bfloat16 costs the solved layer less than half a percent."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(2048, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    W = torch.randn(64, 128, generator=generator)
    exact = X.double().T @ X.double() / len(X)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        H = Hessian(128)
        H.add(X.to(dtype))
        E = W.double() - solve(W, H.mean(), QuantizeConfig(bits=3)).dequantize(torch.float64)
        losses.append(float(((E @ exact) * E).sum()))
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_moments_are_those_of_the_distance(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    y, x = (torch.randn(3, 40, k, generator=generator).to(dtype) for k in (24, 16))
    original = (y.float() + 0.1 * torch.randn(3, 40, 24, generator=generator)).to(dtype)
    moment = CrossMoment(24, 16)
    moment.add(original, y, x, None)
    distance = (original.double() - y.double()).reshape(120, 24)
    exact = distance.T @ x.double().reshape(120, 16) / 120
    # A distance is rounded to the inputs' type, half of 2⁻⁸ of itself.
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3 * float(exact.abs().max())
    torch.testing.assert_close(moment.take_mean().double(), exact, rtol=0, atol=tolerance)
