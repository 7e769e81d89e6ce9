"""Refit and descent never raise the loss, never leave the grid, and are exact where that is known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundwise import QuantizeConfig, QuantizedWeight, solve
from roundwise.core.backends.dispatch import choose_backend
from roundwise.core.backends.reference import MIN_DISTANCE, MIN_GAIN
from roundwise.core.refine import Refiner
from roundwise.core.refine import refine as refine_with
from tests.core.problems import layer


def refine(
    q: QuantizedWeight, T: torch.Tensor, H: torch.Tensor, *, rounds: int, moves: int,
    keep_scales: bool,
) -> QuantizedWeight:  # fmt: skip
    """With the backend that a solve would choose."""
    return refine_with(
        q, T, H, rounds=rounds, moves=moves, keep_scales=keep_scales, backend=choose_backend(T)
    )


def losses(q: QuantizedWeight, T: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """(Q - T) H (Q - T)ᵀ of each row."""
    E = q.dequantize(T.dtype) - T
    return ((E @ H) * E).sum(dim=1)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20), groups=st.integers(1, 4), bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    sym=st.booleans(), desc_act=st.booleans(), recipe=st.sampled_from(["best", "textbook"]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_each_step_is_monotone(
    rows: int, groups: int, bits: int, sym: bool, desc_act: bool, recipe: str, seed: int
) -> None:
    T, H = layer(seed, rows, groups * 32)
    config = QuantizeConfig(
        recipe=recipe, bits=bits, sym=sym, desc_act=desc_act, group_size=32, refine=0
    )
    q = solve(T, H, config)
    state = Refiner(q, T, H, choose_backend(T))
    before = losses(q, T, H)
    steps = [state.refit, state.descend, partial(state.exchange, moves=4)]
    for step in [*steps, *steps, *steps[::-1]]:
        step()
        after = losses(state.result(q), T, H)
        assert (after <= before * (1 + 1e-9) + 1e-15).all()
        before = after


@pytest.mark.parametrize("moves", [1, 8])
@pytest.mark.parametrize("desc_act", [False, True])
def test_refining_helps_and_stays_on_the_grid(desc_act: bool, moves: int) -> None:
    T, H = layer(1, rows=32, width=256)
    q = solve(T, H, QuantizeConfig(bits=3, refine=0, desc_act=desc_act))
    better = refine(q, T, H, rounds=4, moves=moves, keep_scales=False)
    assert losses(better, T, H).sum() < 0.98 * losses(q, T, H).sum()
    assert int(better.codes.max()) <= 7
    assert better.scales.dtype == torch.float16
    assert torch.equal(better.zeros, q.zeros)
    assert (better.scales.sign() == q.scales.sign()).all()


def test_descent_ends_where_no_single_code_can_improve() -> None:
    T, H = layer(2, rows=4, width=32)
    q = solve(T, H, QuantizeConfig(bits=2, refine=0, group_size=16))
    best = refine(q, T, H, rounds=50, moves=1, keep_scales=True)
    floor = losses(best, T, H)
    for column in range(32):
        for change in (-1, 1):
            codes = best.codes.long()
            codes[:, column] = (codes[:, column] + change).clamp(0, 3)
            other = losses(replace(best, codes=codes.to(torch.uint8)), T, H)
            assert (other >= floor * (1 - 1e-9)).all()


@pytest.mark.parametrize("window", [80, 1024])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_exchange_continues_where_descent_ends(
    bits: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("roundwise.core.refine.WINDOW", window)
    T, H = layer(6, rows=32, width=192)
    q = solve(T, H, QuantizeConfig(bits=bits, refine=0, group_size=64))
    ended = refine(q, T, H, rounds=30, moves=1, keep_scales=True)
    before = losses(ended, T, H)
    after = [
        losses(refine(ended, T, H, rounds=1, moves=moves, keep_scales=True), T, H)
        for moves in (2, 8)
    ]
    for each in after:
        assert (each <= before).all()
    assert after[1].sum() < after[0].sum() < before.sum()
    assert after[1].sum() < 0.99 * before.sum()


def test_no_pair_is_left_that_an_exchange_would_find() -> None:
    """Every column far enough from its best value, with every other one's best answer."""
    T, H = layer(2, rows=4, width=24)
    q = solve(T, H, QuantizeConfig(bits=3, refine=0, group_size=24))
    best = refine(q, T, H, rounds=50, moves=2, keep_scales=True)
    floor, own = losses(best, T, H), H.diagonal() * best.scales[:, :1].double().square()
    G = (best.dequantize(torch.float64) - T) @ H
    step = -G / (H.diagonal() * best.scales.double())
    for i in range(24):
        for j in range(24):
            for change in (-1, 1):
                codes = best.codes.long()
                codes[:, i] += torch.where(step[:, i] >= 0, 1, -1)
                codes[:, j] += change
                other = losses(replace(best, codes=codes.clamp(0, 7).to(torch.uint8)), T, H)
                tried = (step[:, i].abs() >= MIN_DISTANCE) & ((codes >= 0) & (codes <= 7)).all(
                    dim=1
                )
                assert (other >= floor - MIN_GAIN * own[:, i])[tried].all()


def test_the_refit_is_the_least_squares_solution() -> None:
    """One group: s = (V H Tᵀ) / (V H Vᵀ), up to float16."""
    T, H = layer(3, rows=8, width=64)
    q = solve(T, H, QuantizeConfig(bits=3, group_size=-1, refine=0))
    state = Refiner(q, T, H, choose_backend(T))
    state.refit()
    V = q.codes.double() - q.zeros.double()
    expected = ((V @ H) * T).sum(dim=1) / ((V @ H) * V).sum(dim=1)
    scales = state.result(q).scales[:, 0].double()
    changed = scales != q.scales[:, 0].double()
    assert changed.any()
    assert torch.allclose(scales[changed], expected[changed], rtol=1e-3)


def test_a_group_that_is_all_zero_keeps_its_scale() -> None:
    T, H = layer(4, rows=4, width=64)
    T[:, :32] = 0
    H[:32, 32:] = H[32:, :32] = 0
    q = solve(T, H, QuantizeConfig(bits=4, group_size=32, refine=0))
    better = refine(q, T, H, rounds=2, moves=8, keep_scales=False)
    assert torch.equal(better.scales[:, 0], q.scales[:, 0])
    assert (better.dequantize()[:, :32] == 0).all()


def test_the_choice_of_the_grid_by_true_loss_never_raises_it() -> None:
    """One group: the best of eight candidates cannot lose to the first alone."""
    T, H = layer(5, rows=64, width=64)
    few, many = (
        solve(T, H, QuantizeConfig(bits=3, group_size=-1, refine=0, grid_candidates=count))
        for count in (1, 8)
    )
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(64, dtype=H.dtype)
    one, eight = losses(few, T, damped), losses(many, T, damped)
    assert (eight <= one * (1 + 1e-9)).all()
    assert eight.sum() < one.sum()
