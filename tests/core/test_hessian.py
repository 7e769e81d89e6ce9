"""The Hessian is the mean of xxᵀ over the tokens that count, whatever the dtype and the batches."""

from __future__ import annotations

import pytest
import torch

from roundwise import Hessian, QuantizeConfig, solve
from roundwise.core import hessian
from roundwise.core.backends import cpp
from roundwise.core.drift import Drift
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


needs_native = pytest.mark.skipif(
    cpp.load()[0] is None, reason=f"needs the native extension: {cpp.load()[1].reason}"
)
SETS = cpp.load()[0].instruction_sets() if cpp.load()[0] else []


@needs_native
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "m", "n"), [(1, 1, 1), (7, 5, 70), (300, 37, 129), (513, 200, 64), (1030, 96, 96)]
)
def test_native_sums_equal_the_plain_product(
    name: str, dtype: torch.dtype, tokens: int, m: int, n: int
) -> None:
    cpp.load()[0].use(name)
    try:
        if cpp.products(dtype) is None:
            pytest.skip(f"needs an instruction for {dtype} in {name}")
        generator = torch.Generator().manual_seed(tokens)
        A, B = (torch.randn(tokens, k, generator=generator).to(dtype) for k in (m, n))
        C = torch.ones(m, n)
        cpp.add_moment(C, A, B, lower=False)
        torch.testing.assert_close(C.double(), A.double().T @ B.double() + 1, rtol=1e-5, atol=1e-4)
        H = torch.zeros(m, m)
        cpp.add_moment(H, A, A, lower=True)
        exact = A.double().T @ A.double()
        torch.testing.assert_close(H.tril().double(), exact.tril(), rtol=1e-5, atol=1e-4)
    finally:
        cpp.load()[0].use(SETS[0])


def test_what_the_dtype_of_the_inputs_does_to_the_loss() -> None:
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


def test_a_drift_may_be_summed_up_as_it_reaches_the_output() -> None:
    """(X̃ - X)ᵀX first and W afterwards, or (X̃ - X)Wᵀ first: the same Y."""
    generator = torch.Generator().manual_seed(3)
    x, r, W = (torch.randn(*n, generator=generator) for n in ((50, 24), (50, 16), (16, 24)))
    x0, r0 = (y + 0.1 * torch.randn(y.shape, generator=generator) for y in (x, r))
    apart = [CrossMoment(24, 24), CrossMoment(16, 24)]
    apart[0].add(x0, x, x, None)
    apart[1].add(r0, r, x, None)
    together = CrossMoment(16, 24)
    together.add(r0, r, x, None, (x0 - x) @ W.T * (0.5 / 0.8))
    wanted = Drift(*(moment.take_mean() for moment in apart)).take_target_shift(W, 0.5, 0.8)
    found = Drift(None, together.take_mean()).take_target_shift(W, 0.5, 0.8)
    torch.testing.assert_close(found, wanted)
    # And of (X̃ - X)Wᵀ, X̃Wᵀ with the batch and XWᵀ in the end.
    outputs, H = CrossMoment(16, 24), Hessian(24)
    outputs.add(r0, r, x, None, x0 @ W.T * (0.5 / 0.8))
    H.add(x)
    drift = Drift(None, outputs.take_mean())
    drift.subtract_output(W, H.mean(), 0.5 / 0.8)
    torch.testing.assert_close(drift.take_target_shift(W, 0.5, 0.8), wanted, rtol=1e-4, atol=1e-5)
