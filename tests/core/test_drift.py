"""The target makes a layer reproduce the original model's output from the input that it gets."""

from __future__ import annotations

import pytest
import torch

from roundwise.core.drift import (
    RIDGES,
    ROWS,
    Drift,
    Moments,
    SampledRows,
    confirm,
    corrected_target,
)
from roundwise.core.hessian import CrossMoment, Hessian
from roundwise.core.linalg import factor
from tests.core.oracle import damped
from tests.core.problems import layer


def inputs(tokens: int = 500, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """X and X̃ [tokens, width]."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(20, width, generator=generator)
    X = torch.randn(tokens, 20, generator=generator) @ mix
    X += 0.2 * torch.randn(tokens, width, generator=generator)
    return X, X + 0.3 * torch.randn(tokens, width, generator=generator)


def moments(X: torch.Tensor, original: torch.Tensor) -> Moments:
    return Moments(X.T @ X / len(X), Drift((original - X).T @ X / len(X)), len(X))


def test_the_target_is_the_best_weight_for_the_original_output() -> None:
    """Without damping, T is the least-squares solution of X Tᵀ = X̃ Wᵀ + R̃ - R."""
    X, original = (x.double() for x in inputs())
    W = torch.randn(10, 64, generator=torch.Generator().manual_seed(1)).double()
    residual = torch.randn(500, 10, generator=torch.Generator().manual_seed(2)).double()
    drift = Drift((original - X).T @ X / 500, residual.T @ X / 500)
    Y = drift.take_target_shift(W, 1.0, 1.0)
    assert Y is not None
    assert drift.residual is None
    perm = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    T = corrected_target(W, Y, perm, factor(X.T @ X / 500, perm, 0.0))
    assert T is Y
    expected = torch.linalg.lstsq(X, original @ W.T + residual).solution.T
    torch.testing.assert_close(T, expected)


def test_the_target_is_taken_with_the_damping_of_the_factor() -> None:
    W, H = layer(0, rows=ROWS + 5, width=48)
    Y = 0.01 * torch.randn(W.shape, generator=torch.Generator().manual_seed(0)).double()
    expected = W + torch.linalg.solve(damped(H, 0.01), Y.T).T
    perm = torch.arange(48).flip(0)
    torch.testing.assert_close(corrected_target(W, Y, perm, factor(H, perm, 0.01)), expected)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (0.5, 0.0), (0.5, 0.8)])
def test_corrections_have_a_strength(alpha: float, beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    W, residual = (torch.randn(16, 24, generator=generator) for _ in range(2))
    square = torch.randn(24, 24, generator=generator)
    Y = Drift(square, residual.clone()).take_target_shift(W, alpha, beta)
    torch.testing.assert_close(Y, alpha * W @ square + beta * residual)


def test_without_drift_there_is_nothing_to_correct() -> None:
    assert Drift().take_target_shift(torch.ones(4, 8), 1.0, 1.0) is None
    assert Drift(torch.ones(8, 8)).take_target_shift(torch.ones(4, 8), 0.0, 1.0) is None


def test_the_drift_of_some_rows_leaves_that_of_all_alone() -> None:
    drift = Drift(torch.ones(8, 8), torch.ones(6, 8))
    some = drift.rows(slice(0, None, 2))
    assert some.residual is not None
    some.residual.zero_()
    assert drift.residual is not None
    assert torch.equal(drift.residual, torch.ones(6, 8))


def test_a_drift_can_be_summed_up_behind_the_layer() -> None:
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
    shift = Drift(None, together.take_mean()).take_target_shift(W, 0.5, 0.8)
    torch.testing.assert_close(shift, wanted)
    # Or X̃Wᵀ with the batches, and XWᵀ subtracted at the end.
    outputs, H = CrossMoment(16, 24), Hessian(24)
    outputs.add(r0, r, x, None, x0 @ W.T * (0.5 / 0.8))
    H.add(x)
    drift = Drift(None, outputs.take_mean())
    drift.subtract_output(W, H.mean(), 0.5 / 0.8)
    torch.testing.assert_close(drift.take_target_shift(W, 0.5, 0.8), wanted, rtol=1e-4, atol=1e-5)


def test_joined_moments_are_those_of_all_tokens() -> None:
    X, original = inputs()
    parts = [moments(X[:200], original[:200]), moments(X[200:], original[200:])]
    parts[0].join(parts[1])
    whole = moments(X, original)
    torch.testing.assert_close(parts[0].H, whole.H)
    torch.testing.assert_close(parts[0].drift.input, whole.drift.input)
    assert parts[0].tokens == 500


@pytest.mark.parametrize("rows", [1, ROWS + 1])
def test_the_target_of_a_single_row_in_natural_order(rows: int) -> None:
    """The transpose of one row is contiguous: it must not be solved in its own memory."""
    X, original = inputs()
    W = torch.randn(rows, 64, generator=torch.Generator().manual_seed(2))
    fit, perm = moments(X, original), torch.arange(64)
    Y = fit.drift.take_target_shift(W, 1.0, 1.0)
    assert Y is not None
    expected = W.double() + Y.double() @ torch.linalg.inv(damped(fit.H.double(), 0.01))
    T = corrected_target(W, Y, perm, factor(fit.H, perm, 0.01))
    torch.testing.assert_close(T.double(), expected, rtol=1e-3, atol=1e-3)


class TestConfirmedPart:
    """The part of a correction that is right for tokens to which it was not fitted."""

    def tokens(self, count: int, seed: int, effect: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs X [tokens, 64], and X̃ = X A + noise: `effect` of what was lost can be told from X."""
        mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(9)) / 8
        generator = torch.Generator().manual_seed(seed)
        X = torch.randn(count, 64, generator=generator)
        return X, X + effect * X @ mix + torch.randn(count, 64, generator=generator)

    def weight(self) -> torch.Tensor:
        return torch.randn(48, 64, generator=torch.Generator().manual_seed(1))

    def confirm(self, fit: Moments, held: Moments) -> tuple[float, dict[str, float]]:
        return confirm({"q": SampledRows(self.weight(), slice(None), 1.0, 1.0)}, fit, held)

    def part(self, fit: Moments, held: Moments) -> float | None:
        return self.confirm(fit, held)[1].get("q")

    @pytest.mark.parametrize("count", [200, 1000, 5000])
    def test_it_is_the_best_part_on_the_held_out_tokens(self, count: int) -> None:
        (X, original), (held, held_original) = (
            self.tokens(count, 0, 0.3),
            self.tokens(count, 1, 0.3),
        )
        fit, W = moments(X, original), self.weight()
        # Computed from the tokens themselves, not from moments.
        lost = (held_original - held) @ W.T
        losses = {}
        for ridge in RIDGES:
            H = fit.H + ridge * fit.H.diagonal().mean() * torch.eye(64)
            D = W @ ((original - X).T @ X / count) @ torch.linalg.inv(H)
            for s in (i / 1000 for i in range(1, 1001)):
                losses[ridge, s] = float((s * held @ D.T - lost).square().sum())
        ridge, best = min(losses, key=losses.__getitem__)
        # Fitted to twice as many tokens there is half the noise.
        expected = 1 / (1 + (1 / best - 1) / 2)
        found, parts = self.confirm(fit, moments(held, held_original))
        assert found == ridge
        assert parts["q"] == pytest.approx(expected, abs=0.002)

    def test_few_tokens_ask_for_a_larger_ridge(self) -> None:
        # Inputs near few directions: only in these can something be told from few tokens.
        basis = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))

        def drawn(count: int, seed: int) -> Moments:
            generator = torch.Generator().manual_seed(seed)
            X = torch.randn(count, 4, generator=generator) @ basis
            X += 0.1 * torch.randn(count, 64, generator=generator)
            noise = torch.randn(count, 64, generator=generator)
            return moments(X, X + 0.3 * X.roll(1, dims=1) + noise)

        few, many = (self.confirm(drawn(n, 0), drawn(2000, 1)) for n in (80, 50_000))
        assert few[0] > many[0] == RIDGES[0]

    @pytest.mark.parametrize("rows", [1, 700, ROWS + 1])
    def test_shrunk_moments_give_the_correction_with_the_ridge(self, rows: int) -> None:
        X, original = self.tokens(300, 0, 0.3)
        fit, mean = moments(X, original), float((X.T @ X / 300).diagonal().mean())
        fit.drift.residual = torch.randn(rows, 64, generator=torch.Generator().manual_seed(5))
        eye = torch.eye(64)
        expected = [
            Y @ torch.linalg.inv(fit.H + 0.5 * mean * eye)
            for Y in (fit.drift.input, fit.drift.residual)
        ]
        fit.drift.shrink(factor(fit.H, torch.arange(64), 0.5), (0.5 - 0.01) * mean)
        for Y, D in zip((fit.drift.input, fit.drift.residual), expected, strict=True):
            assert Y is not None
            torch.testing.assert_close(
                Y @ torch.linalg.inv(fit.H + 0.01 * mean * eye), D, rtol=1e-3, atol=1e-4
            )

    def test_noise_alone_is_not_confirmed_and_more_tokens_confirm_more(self) -> None:
        held = moments(*self.tokens(20_000, 1, 0.0))
        assert self.part(moments(*self.tokens(200, 0, 0.0)), held) == pytest.approx(0.0, abs=0.05)
        held = moments(*self.tokens(500, 1, 0.3))
        few, many = (self.part(moments(*self.tokens(n, 0, 0.3)), held) for n in (100, 5000))
        assert few is not None and many is not None
        assert few < 0.8 < many

    def test_the_opposite_on_held_out_tokens_leaves_nothing(self) -> None:
        fit, held = moments(*self.tokens(500, 0, 0.5)), moments(*self.tokens(500, 1, -0.5))
        assert self.part(fit, held) == 0.0

    def test_without_drift_there_is_nothing_to_confirm(self) -> None:
        X = self.tokens(100, 0, 0.0)[0]
        assert self.part(Moments(X.T @ X, Drift(), 100), Moments(X.T @ X, Drift(), 100)) is None

    def test_the_moments_are_not_changed(self) -> None:
        def made() -> list[Moments]:
            parts = [moments(*self.tokens(200, seed, 0.3)) for seed in (0, 1)]
            for each in parts:
                each.drift.residual = torch.full((48, 64), 0.1)
            return parts

        fit, held = made()
        first = self.part(fit, held)
        for each, before in zip((fit, held), made(), strict=True):
            assert torch.equal(each.H, before.H)
            assert torch.equal(each.drift.input, before.drift.input)  # type: ignore[arg-type]
            assert each.drift.residual is not None
            assert torch.equal(each.drift.residual, before.drift.residual)  # type: ignore[arg-type]
        assert self.part(fit, held) == first
