"""Damping chosen on held-out tokens is the one that does best there."""

from __future__ import annotations

import pytest
import torch

from roundwise.config import QuantizeConfig
from roundwise.core.drift import Drift, Moments
from roundwise.core.held_out_damping import DAMPINGS, held_out_losses
from roundwise.core.solver import solve
from roundwise.errors import ConfigError, SingularError

CONFIG = QuantizeConfig(bits=3, group_size=32, recipe="textbook", damp_percent="auto")
BEST = QuantizeConfig(
    bits=3, group_size=32, damp_percent="auto", grid_candidates=1, refine=0, order="natural"
)


def inputs(tokens: int, seed: int, noise: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """X and X̃ [tokens, 64] that lie near few directions, as hidden states do."""
    generator = torch.Generator().manual_seed(99)
    mix = torch.randn(20, 64, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, 20, generator=generator) @ mix
    X += noise * torch.randn(tokens, 64, generator=generator)
    return X, X + 0.3 * torch.randn(tokens, 64, generator=generator)


def moments(X: torch.Tensor, original: torch.Tensor | None = None) -> Moments:
    drift = Drift() if original is None else Drift((original - X).T @ X / len(X))
    return Moments(X.T @ X / len(X), drift, len(X))


def weight() -> torch.Tensor:
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(1))


def test_losses_are_those_of_outputs_on_the_held_out_tokens() -> None:
    (X, _), (held, _) = inputs(200, 0), inputs(300, 1)
    W = weight()
    losses = held_out_losses([(W, CONFIG)], moments(X), moments(held))
    assert tuple(losses) == DAMPINGS
    for damping, loss in losses.items():
        q = solve(W, X.T @ X / len(X), CONFIG.merged({"damp_percent": damping}))
        expected = (held @ (W - q.dequantize()).T).square().sum() / (held @ W.T).square().sum()
        assert loss == pytest.approx(float(expected), rel=1e-3)


def test_with_drift_the_output_aimed_at_is_the_original_models() -> None:
    (X, original), (held, held_original) = inputs(200, 0), inputs(300, 1)
    W = weight()
    losses = held_out_losses([(W, BEST)], moments(X, original), moments(held, held_original))
    wanted = held_original @ W.T
    # What no Q changes is left out of the losses.
    constant = (held @ W.T - wanted).square().sum() / (held @ W.T).square().sum()
    for damping, loss in losses.items():
        fit = moments(X, original)
        target_shift = fit.drift.take_target_shift(W, 1.0, 1.0)
        q = solve(W, fit.H, BEST.merged({"damp_percent": damping}), target_shift=target_shift)
        expected = (held @ q.dequantize().T - wanted).square().sum()
        expected = expected / (held @ W.T).square().sum() - constant
        assert loss == pytest.approx(float(expected), rel=1e-2, abs=1e-4)


def test_the_moments_are_not_changed() -> None:
    # They are needed afterwards, and `take_target_shift` consumes what it is given.
    def made() -> list[Moments]:
        parts = [moments(*inputs(200, 0)), moments(*inputs(300, 1))]
        for part in parts:
            part.drift.residual = torch.full((48, 64), 0.1)
        return parts

    fit, held = made()
    first = held_out_losses([(weight(), BEST)], fit, held)
    for part, before in zip((fit, held), made(), strict=True):
        assert torch.equal(part.H, before.H)
        assert torch.equal(part.drift.input, before.drift.input)  # type: ignore[arg-type]
        assert part.drift.residual is not None
        assert torch.equal(part.drift.residual, before.drift.residual)  # type: ignore[arg-type]
    assert held_out_losses([(weight(), BEST)], fit, held) == first


def test_few_tokens_ask_for_more_damping_than_many() -> None:
    held = moments(*inputs(4000, 5, noise=1.0))
    few, many = (
        held_out_losses([(weight(), BEST)], moments(*inputs(tokens, 0, noise=1.0)), held)
        for tokens in (40, 20_000)
    )
    assert min(few, key=few.__getitem__) >= 0.03
    assert few[0.001] > 1.4 * few[0.1]
    assert many[0.001] < 1.1 * many[0.1]


def test_weights_count_alike() -> None:
    fit, held = moments(inputs(200, 0)[0]), moments(inputs(300, 1)[0])
    one = held_out_losses([(weight(), CONFIG)], fit, held)
    two = held_out_losses([(weight(), CONFIG), (1000 * weight(), CONFIG)], fit, held)
    for damping in DAMPINGS:
        assert two[damping] == pytest.approx(2 * one[damping], rel=0.02)


def test_without_tokens_there_is_nothing_to_choose_by() -> None:
    X = inputs(300, 1)[0]
    with pytest.raises(SingularError, match="no calibration input reached"):
        held_out_losses([(weight(), CONFIG)], moments(torch.zeros(3, 64)), moments(X))


def test_the_solver_alone_cannot_choose() -> None:
    with pytest.raises(ConfigError, match=r"damp_percent=auto is settled by a run.*give a number"):
        solve(weight(), torch.eye(64), CONFIG)
