"""Grids cover their weights, and their scales are float16 values."""

from __future__ import annotations

import pytest
import torch

from roundwise import QuantizeConfig
from roundwise.core.grid import (
    MIN_SCALE,
    GridSpec,
    decode,
    encode,
    minmax,
    round_to_float16,
)
from roundwise.core.solver import grid_spec
from roundwise.errors import NumericalError


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("min_zero", [0, 1])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0])
def test_every_weight_is_within_a_step(bits: int, sym: bool, min_zero: int, shift: float) -> None:
    maxq = 2**bits - 1
    W = shift + torch.rand(
        16, 64, generator=torch.Generator().manual_seed(bits), dtype=torch.float64
    )
    grid = minmax(W, GridSpec(bits, sym, min_zero))
    assert torch.equal(grid.scale, grid.scale.half().double())
    codes = encode(W.T, grid, maxq)
    assert codes.min() >= 0
    assert codes.max() <= maxq
    # A symmetric grid has no code for its upper end: up to one step (and rounding) is missing there.
    worst = 1.01 if sym or min_zero else 0.51
    assert ((decode(codes, grid) - W.T).abs() <= worst * grid.scale).all()
    if sym:
        assert (grid.zero == 2 ** (bits - 1)).all()
    else:
        assert grid.zero.min() >= min_zero
        assert grid.zero.max() <= maxq


def test_zero_is_always_on_the_grid() -> None:
    W = torch.tensor([[0.5, 1.0], [-2.0, -1.0]])
    grid = minmax(W, GridSpec(4, sym=False))
    assert (decode(encode(torch.zeros(1, 2), grid, 15), grid) == 0).all()


def test_a_group_of_zeros_has_a_scale() -> None:
    grid = minmax(torch.zeros(2, 8), GridSpec(4, sym=True))
    assert (grid.scale > 0).all()


def test_scales_fit_float16() -> None:
    assert round_to_float16(torch.tensor([1e-12])).item() == MIN_SCALE
    for value in (1e6, float("nan"), float("inf")):
        with pytest.raises(NumericalError, match="does not fit float16"):
            round_to_float16(torch.tensor([value]))


def test_the_rules_of_a_grid_follow_the_settings() -> None:
    spec = grid_spec(QuantizeConfig(bits=3, positive_scales=True, grid_candidates=5))
    assert (spec.bits, spec.maxq, spec.sym, spec.min_zero) == (3, 7, True, 1)
    assert (spec.flip_sign, spec.search, spec.keep) == (False, "pivot", 5)
    textbook = grid_spec(QuantizeConfig(sym=False, grid="minmax", grid_candidates=5))
    # Without a search there is one candidate.
    assert (textbook.min_zero, textbook.flip_sign, textbook.keep) == (0, True, 1)


def test_a_search_weighs_errors_by_pivots_or_alike() -> None:
    D = torch.tensor([1.0, 3.0])
    assert GridSpec(4, sym=True, search="pivot").error_weights(D) is D
    weights = GridSpec(4, sym=True, search="mse").error_weights(D)
    assert weights is not None
    assert weights.tolist() == [1.0, 1.0]
    assert GridSpec(4, sym=True, search="minmax").error_weights(D) is None
