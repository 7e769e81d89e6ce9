"""What holds for every weight and Hessian, and what becomes of numbers at the edge.

Sound means: codes on the grid, scales finite and not zero, and stored values that are what was measured.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundwise import QuantizeConfig, QuantizedWeight, round_to_nearest, solve
from roundwise.core import solver
from roundwise.core.backends import reference
from roundwise.errors import NumericalError, SingularError
from tests.core.oracle import output_error
from tests.core.test_solver import layer

RECIPES = [{"recipe": "best"}, {"recipe": "textbook"}]


def sound(q: QuantizedWeight) -> QuantizedWeight:
    assert int(q.codes.max()) < 2**q.bits
    assert torch.isfinite(q.scales).all()
    assert (q.scales != 0).all()
    assert torch.isfinite(q.dequantize()).all()
    return q


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4, 8]), sym=st.booleans(),
    group=st.sampled_from([16, 32, -1]), width=st.sampled_from([32, 64, 96]), rows=st.integers(1, 40),
)  # fmt: skip
def test_the_default_recipe_never_loses_more_than_rounding(seed, bits, sym, group, width, rows):
    W, H = layer(seed, rows, width)
    config = QuantizeConfig(bits=bits, sym=sym, group_size=group)
    q, nearest = sound(solve(W, H, config)), round_to_nearest(W, config)
    ours, theirs = (output_error(W, x.dequantize().double(), H) for x in (q, nearest))
    assert ours <= theirs * (1 + 1e-6)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4, 8]),
    settings=st.sampled_from(
        [
            {"sym": False}, {"grid": "minmax"}, {"recipe": "textbook"},
            {"sym": False, "grid": "mse"}, {"positive_scales": True},
            {"positive_scales": True, "order": "static"},
        ]
    ),
)  # fmt: skip
def test_scales_are_positive_where_no_range_can_be_turned_around(seed, bits, settings):
    W, H = layer(seed, 24, 64)
    assert (
        sound(solve(W, H, QuantizeConfig(bits=bits, group_size=32, **settings))).scales > 0
    ).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 4]), recipe=st.sampled_from(RECIPES))
def test_permuting_rows_permutes_the_result(seed, bits, recipe):
    W, H = layer(seed, 24, 64)
    config = QuantizeConfig(bits=bits, group_size=32, **recipe)
    perm = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    q, permuted = solve(W, H, config), solve(W[perm], H, config)
    assert torch.equal(q.codes[perm], permuted.codes)
    assert torch.equal(q.scales[perm], permuted.scales)
    assert torch.equal(q.zeros[perm], permuted.zeros)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000), power=st.integers(-4, 4), sym=st.booleans(),
    recipe=st.sampled_from(RECIPES),
)  # fmt: skip
def test_scaling_the_weight_scales_the_result(seed, power, sym, recipe):
    W, H = layer(seed, 16, 64)
    config = QuantizeConfig(bits=3, group_size=32, sym=sym, **recipe)
    q, scaled = solve(W, H, config), solve(W * 2.0**power, H, config)
    assert torch.equal(q.codes, scaled.codes)
    assert torch.equal(q.scales * 2.0**power, scaled.scales)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_size_of_the_parts_does_not_change_codes(recipe, monkeypatch):
    W, H = layer(3, 40, 256)
    config = QuantizeConfig(bits=3, group_size=32, **recipe)
    whole = solve(W, H, config)
    monkeypatch.setattr(solver, "ROW_WORKSPACE", 256 * 7)
    monkeypatch.setattr(reference, "WORKSPACE", 1 << 12)
    parts = solve(W, H, config)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestEdges:
    def solved(self, W: torch.Tensor, H: torch.Tensor, dtype: torch.dtype, recipe: dict) -> None:
        config = QuantizeConfig(bits=4, group_size=32, **recipe)
        q = sound(solve(W.to(dtype), H.to(dtype), config))
        nearest = round_to_nearest(W, config)
        ours, theirs = (output_error(W, x.dequantize().double(), H) for x in (q, nearest))
        assert ours <= 1.01 * theirs + 1e-12

    def test_a_single_token(self, dtype, recipe):
        W, _ = layer(0, 16, 64)
        x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.solved(W, x.T @ x, dtype, recipe)

    def test_constant_inputs(self, dtype, recipe):
        W, _ = layer(0, 16, 64)
        self.solved(W, torch.ones(64, 64, dtype=torch.float64), dtype, recipe)

    def test_channels_without_input(self, dtype, recipe):
        W, H = layer(0, 16, 64)
        H[::3] = 0
        H[:, ::3] = 0
        self.solved(W, H, dtype, recipe)

    def test_one_huge_channel(self, dtype, recipe):
        W, H = layer(0, 16, 64)
        H[7] *= 1e4
        H[:, 7] *= 1e4
        self.solved(W, H, dtype, recipe)

    def test_one_huge_weight(self, dtype, recipe):
        W, H = layer(0, 16, 64)
        W[3, 5] = 1e3
        self.solved(W, H, dtype, recipe)

    def test_channels_whose_weights_are_zero(self, dtype, recipe):
        W, H = layer(0, 16, 64)
        W[:, :32] = 0
        W[4] = 0
        self.solved(W, H, dtype, recipe)

    def test_tiny_hessians(self, dtype, recipe):
        W, H = layer(0, 16, 64)
        self.solved(W, H * 1e-20, dtype, recipe)

    def test_an_indefinite_hessian_is_damped_or_named(self, dtype, recipe):
        W, H = layer(0, 16, 64)
        H -= 0.5 * H.diagonal().mean() * torch.eye(64, dtype=torch.float64)
        config = QuantizeConfig(bits=4, group_size=32, **recipe)
        q = sound(solve(W.to(dtype), H.to(dtype), config))
        assert len(q.damp_tried) > 1
        with pytest.raises(SingularError, match=r"indefinite|zero"):
            solve(W.to(dtype), -H.to(dtype), config)

    @pytest.mark.parametrize("size", [1e-6, 1e-9, 1e-30])
    def test_weights_whose_steps_are_no_float16(self, size, dtype, recipe):
        """Steps below 6e-8 vanish in float16: a sound result, or an error that says so."""
        W, H = layer(0, 16, 64)
        config = QuantizeConfig(bits=4, group_size=32, **recipe)
        q = sound(solve((size * W).to(dtype), H.to(dtype), config))
        assert float(q.dequantize().abs().max()) < 1e-5

    def test_weights_beyond_float16(self, dtype, recipe):
        W, H = layer(0, 16, 64)
        config = QuantizeConfig(bits=4, group_size=32, **recipe)
        with pytest.raises(NumericalError, match="does not fit float16"):
            solve((1e9 * W).to(dtype), H.to(dtype), config)
