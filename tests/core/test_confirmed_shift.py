"""The part of a correction that is right on tokens to which it was not fitted."""

from __future__ import annotations

import pytest
import torch

from roundwise.config import QuantizeConfig
from roundwise.core.confirmed_shift import confirmed_part
from roundwise.core.drift import Drift, Moments
from roundwise.core.solver import prepare_hessian

CONFIG = QuantizeConfig(bits=3, group_size=32, damp_percent=0.01)
WIDTH = 64


def tokens(count: int, seed: int, effect: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs X [tokens, 64], and X̃ = X A + noise: `effect` of what was lost can be told from X."""
    A = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) / WIDTH**0.5
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(count, WIDTH, generator=generator)
    return X, X + effect * X @ A + torch.randn(count, WIDTH, generator=generator)


def moments(X: torch.Tensor, original: torch.Tensor | None = None) -> Moments:
    drift = Drift() if original is None else Drift((original - X).T @ X / len(X))
    return Moments(X.T @ X / len(X), drift, len(X))


def weight() -> torch.Tensor:
    return torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(1))


def part(fit: Moments, held: Moments) -> float | None:
    return confirmed_part(weight(), CONFIG, fit, prepare_hessian(fit.H, CONFIG), held)


@pytest.mark.parametrize("count", [200, 1000, 5000])
def test_it_is_the_best_part_on_the_held_out_tokens(count: int) -> None:
    (X, original), (held, held_original) = tokens(count, 0, 0.3), tokens(count, 1, 0.3)
    fit, W = moments(X, original), weight()
    # Computed from the tokens themselves, not from moments.
    H = fit.H + 0.01 * fit.H.diagonal().mean() * torch.eye(WIDTH)
    D = W @ ((original - X).T @ X / count) @ torch.linalg.inv(H)
    lost = (held_original - held) @ W.T
    candidates = [i / 1000 for i in range(1001)]
    losses = [float((s * held @ D.T - lost).square().sum()) for s in candidates]
    best = candidates[losses.index(min(losses))]
    # Fitted to twice as many tokens there is half the noise.
    expected = 1 / (1 + (1 / best - 1) / 2)
    assert part(fit, moments(held, held_original)) == pytest.approx(expected, abs=0.002)


def test_noise_alone_is_not_confirmed_and_more_tokens_confirm_more() -> None:
    held = moments(*tokens(20_000, 1, 0.0))
    assert part(moments(*tokens(200, 0, 0.0)), held) == pytest.approx(0.0, abs=0.05)
    held = moments(*tokens(500, 1, 0.3))
    few, some, many = (part(moments(*tokens(n, 0, 0.3)), held) for n in (100, 500, 5000))
    assert few is not None and some is not None and many is not None
    assert few < some < many < 1.0 and few < 0.5 and many > 0.85


def test_the_opposite_on_held_out_tokens_leaves_nothing() -> None:
    fit, held = moments(*tokens(500, 0, 0.5)), moments(*tokens(500, 1, -0.5))
    assert part(fit, held) == 0.0


def test_without_drift_there_is_nothing_to_confirm() -> None:
    X = tokens(100, 0, 0.0)[0]
    assert part(moments(X), moments(X)) is None


def test_the_moments_are_not_changed() -> None:
    def made() -> list[Moments]:
        parts = [moments(*tokens(200, seed, 0.3)) for seed in (0, 1)]
        for each in parts:
            each.drift.residual = torch.full((48, WIDTH), 0.1)
        return parts

    fit, held = made()
    first = part(fit, held)
    for each, before in zip((fit, held), made(), strict=True):
        assert torch.equal(each.H, before.H)
        assert torch.equal(each.drift.input, before.drift.input)  # type: ignore[arg-type]
        assert each.drift.residual is not None
        assert torch.equal(each.drift.residual, before.drift.residual)  # type: ignore[arg-type]
    assert part(fit, held) == first
