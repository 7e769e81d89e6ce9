"""The fast solver is the published algorithm, and its result is sound for every weight and Hessian.

Its codes are those of the float64 oracle, but for rounding ties. Sound means: codes on the grid, scales
finite and not zero, and stored values that are the measured ones.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundwise import QuantizeConfig, QuantizedWeight, round_to_nearest, solve
from roundwise.core import solver
from roundwise.core.act_order import processing_order
from roundwise.core.backends import reference
from roundwise.core.grid import Grid
from roundwise.core.solver import grid_spec
from roundwise.errors import ConfigError, NumericalError, SingularError
from tests.core import oracle
from tests.core.oracle import output_error
from tests.core.problems import layer


def textbook(**kwargs: object) -> QuantizeConfig:
    return QuantizeConfig(recipe="textbook", **kwargs)


def assert_codes_of_the_oracle(W: torch.Tensor, H: torch.Tensor, config: QuantizeConfig) -> None:
    """Codes equal the oracle's in each row, up to the first column that is a rounding tie."""
    q = solve(W, H, config)
    order = processing_order(H.diagonal(), config)
    fixed = None
    if order.fixed_grids:
        nearest = round_to_nearest(W, config)
        fixed = (nearest.scales.double(), nearest.zeros.double())
    reference = oracle.gptq_in_order(
        W, H, order,
        bits=config.bits, sym=config.sym, damp=config.damp_percent,
        min_zero=grid_spec(config).min_zero, fixed=fixed,
    )  # fmt: skip
    tied = (reference.margin[:, order.perm] < 1e-6).cummax(dim=1).values
    differ = (q.codes.long() != reference.codes)[:, order.perm] & ~tied
    assert not differ.any()
    ours, theirs = (output_error(W, Q, H) for Q in (q.dequantize().double(), reference.Q))
    assert ours <= 1.001 * theirs


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group_size", [16, 64, 192])
def test_the_textbook_recipe_is_the_published_algorithm(bits: int, group_size: int) -> None:
    """Bit for bit, on a layer without rounding ties."""
    W, H = layer(bits, rows=24, width=192)
    q = solve(W, H, textbook(bits=bits, group_size=group_size))
    Q = oracle.gptq(W, H, bits=bits, group_size=group_size)
    assert torch.equal(q.dequantize(torch.float64), Q)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("order", ["natural", "static", "group_aware", "desc_act"])
def test_codes_equal_the_oracle(bits: int, sym: bool, group_size: int, order: str) -> None:
    W, H = layer(bits, rows=24, width=256)
    ordering = {"desc_act": True} if order == "desc_act" else {"order": order}
    assert_codes_of_the_oracle(
        W, H, textbook(bits=bits, sym=sym, group_size=group_size, **ordering)
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 9),
    width=st.integers(1, 6).map(lambda n: 24 * n),
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    sym=st.booleans(),
    group_size=st.sampled_from([8, 16, 24, 64, -1]),
    order=st.sampled_from(["natural", "static", "group_aware"]),
    damp=st.sampled_from([1e-3, 0.01, 0.1]),
)
def test_codes_equal_the_oracle_for_any_shape(
    seed: int, rows: int, width: int, bits: int, sym: bool, group_size: int, order: str, damp: float
) -> None:
    W, H = layer(seed, rows, width)
    assert_codes_of_the_oracle(
        W, H,
        textbook(bits=bits, sym=sym, group_size=group_size, order=order, damp_percent=damp),
    )  # fmt: skip


@pytest.mark.parametrize("width", [256, 640])
def test_float32_is_as_good_as_the_float64_oracle(width: int) -> None:
    W, H = layer(1, rows=64, width=width)
    config = textbook(bits=3)
    reference = oracle.gptq_in_order(W, H, processing_order(H.diagonal(), config), bits=3, sym=True)
    q = solve(W.float(), H.float(), config)
    assert (q.codes.long() == reference.codes).float().mean() > 0.995
    assert output_error(W, q.dequantize(), H) <= 1.001 * output_error(W, reference.Q, H)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_obq_then_gptq_then_rounding(bits: int) -> None:
    """Greedy order costs cubic time per row and gains little: GPTQ's claim (section 3, step 1)."""
    W, H = layer(7, rows=16, width=48)
    config = textbook(bits=bits, group_size=-1, order="natural", damp_percent=1e-6)
    nearest = round_to_nearest(W, config)
    grids = Grid(nearest.scales.double(), nearest.zeros.double())
    greedy = torch.stack(
        [
            oracle.obq(row, H, float(s), int(z), config.maxq)
            for row, s, z in zip(W, grids.scale[:, 0], grids.zero[:, 0], strict=True)
        ]
    )
    errors = [
        output_error(W, Q, H)
        for Q in (greedy, solve(W, H, config, grids=grids).dequantize(), nearest.dequantize())
    ]
    assert errors[1] < 0.6 * errors[2]  # GPTQ is far below rounding …
    assert errors[1] < 1.6 * errors[0]  # … and near the greedy order


class TestWorkedExample:
    """The two-weight example of the GPTQ literature, on the grid of multiples of 0.5."""

    grids = Grid(torch.tensor([[0.5]]).double(), torch.tensor([[8.0]]).double())
    config = textbook(bits=4, group_size=-1, damp_percent=0.0)

    def solve(self, W: list[float], X: list[list[float]]) -> tuple[list[float], torch.Tensor]:
        inputs = torch.tensor(X).double()
        H = 2 * inputs.T @ inputs
        q = solve(torch.tensor([W]).double(), H, self.config, grids=self.grids)
        return q.dequantize()[0].tolist(), H

    def test_error_of_the_first_weight_moves_the_second(self) -> None:
        # W = [0.80, -0.40] on inputs [2, 1] and [1, 3]: H = 2 XᵀX = [[10, 10], [10, 20]].
        Q, H = self.solve([0.80, -0.40], [[2, 1], [1, 3]])
        assert H.tolist() == [[10, 10], [10, 20]]
        # 0.80 -> 1.0 is an error of +0.2; the second weight answers with -0.2 · H₂₁/H₂₂ = -0.1:
        # -0.40 -> -0.50, which is on the grid.
        assert Q == [1.0, -0.5]
        W = torch.tensor([[0.80, -0.40]])
        candidates = {q: output_error(W, torch.tensor([q]), H) for q in ((1.0, -0.5), (0.5, -0.5))}
        assert candidates[1.0, -0.5] < candidates[0.5, -0.5]

    def test_exercise(self) -> None:
        # W = [1.1, -0.7] on inputs [1, 2] and [3, 1]: is it [1.0, -0.5] or [1.0, -1.0]?
        Q, H = self.solve([1.1, -0.7], [[1, 2], [3, 1]])
        assert Q == [1.0, -0.5]
        W = torch.tensor([[1.1, -0.7]])
        better, worse = (output_error(W, torch.tensor([q]), H) for q in ((1.0, -0.5), (1.0, -1.0)))
        # Outputs -0.3 and 2.6 become 0.0 and 2.5, or -1.0 and 2.0. H carries the factor 2.
        assert better == pytest.approx(2 * (0.3**2 + 0.1**2), rel=1e-6)
        assert worse == pytest.approx(2 * (0.7**2 + 0.6**2), rel=1e-6)


class TestReport:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        "config", [{}, {"recipe": "textbook"}, {"recipe": "textbook", "order": "static"}], ids=str
    )
    def test_relative_error_is_measured_on_the_stored_result(
        self, dtype: torch.dtype, config: dict[str, str]
    ) -> None:
        W, H = layer(3, rows=16, width=700)
        W = W.to(dtype).double()
        q = solve(W.to(dtype), H.float(), QuantizeConfig(bits=3, group_size=-1, **config))
        error = output_error(W, q.dequantize(), H) / output_error(W, 0 * W, H)
        assert q.relative_error == pytest.approx(error, rel=1e-3)
        weights = float((W - q.dequantize()).square().sum() / W.square().sum())
        assert q.weight_error == pytest.approx(weights, rel=1e-3)

    def test_a_constant_factor_of_the_hessian_cancels(self) -> None:
        W, H = layer(4, rows=16, width=128)
        q, twice = solve(W, H), solve(W, 2 * H)
        assert torch.equal(q.codes, twice.codes)
        assert q.relative_error == pytest.approx(twice.relative_error)

    def test_v1_files_never_get_zero_point_0(self) -> None:
        W, H = layer(6, rows=8, width=64)
        q = solve(W.abs() + 0.1, H, textbook(sym=False, format="gptq"))
        assert q.zeros.min() == 1
        q = solve(W.abs() + 0.1, H, textbook(sym=False))
        assert q.zeros.min() == 0


class TestDifficultInput:
    def test_damping_is_raised_in_recorded_steps(self) -> None:
        W, H = layer(8, rows=8, width=64)
        values, vectors = torch.linalg.eigh(H)
        values[0] = -0.3 * H.diagonal().mean()  # indefinite, as rounding in low precision leaves it
        q = solve(W, vectors @ values.diag() @ vectors.T, QuantizeConfig(damp_percent=0.01))
        assert q.damp_tried == pytest.approx((0.01, 0.1, 1.0))
        assert q.damp_percent == 1.0

    def test_damping_starts_from_zero_for_a_singular_hessian(self) -> None:
        W, _ = layer(8, rows=8, width=64)
        H = torch.ones(64, 64).double()  # rank one
        q = solve(W, H, QuantizeConfig(damp_percent=0.0))
        assert q.damp_tried[0] == 0.0
        assert q.damp_percent is not None
        assert q.damp_percent > 0

    def test_dead_columns_are_rounded_to_nearest_and_disturb_nothing(self) -> None:
        W, H = layer(9, rows=8, width=64)
        dead = [3, 40]
        H[dead], H[:, dead] = 0.0, 0.0
        q = solve(W, H, textbook(group_size=-1, order="natural"))
        step = q.scales.double()
        assert ((W - q.dequantize())[:, dead].abs() <= step / 2 + 1e-9).all()
        alive = [k for k in range(64) if k not in dead]
        grids = Grid(q.scales.double(), q.zeros.double())
        only = solve(
            W[:, alive], H[alive][:, alive],
            # the mean of the diagonal, which damping refers to, counts the dead columns too
            textbook(group_size=-1, order="natural", damp_percent=0.01 * 62 / 64), grids=grids,
        )  # fmt: skip
        assert torch.equal(only.codes, q.codes[:, alive])

    def test_a_zero_hessian_is_an_error_of_its_own(self) -> None:
        with pytest.raises(SingularError, match="no calibration input"):
            solve(torch.ones(8, 8), torch.zeros(8, 8))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nan_and_infinity(self, value: float) -> None:
        W, H = layer(10, rows=8, width=64)
        with pytest.raises(NumericalError, match="weight"):
            solve(W.index_fill(0, torch.tensor(2), value), H)
        with pytest.raises(NumericalError, match="Hessian"):
            solve(W, H.index_fill(0, torch.tensor(2), value))

    def test_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ConfigError, match=r"H is \(8, 8\)"):
            solve(torch.ones(4, 16), torch.eye(8))
        with pytest.raises(ConfigError, match=r"a weight is \[out, in\]"):
            solve(torch.ones(4), torch.eye(4))

    def test_all_zero_weights(self) -> None:
        q = solve(torch.zeros(8, 64), torch.eye(64))
        assert q.dequantize().abs().max() == 0
        assert (q.relative_error, q.weight_error) == (0.0, 0.0)


def test_rounding_to_nearest_is_within_half_a_step() -> None:
    W, _ = layer(11, rows=8, width=128)
    for sym in (True, False):
        q = round_to_nearest(W, QuantizeConfig(bits=4, group_size=32, sym=sym))
        step = q.scales.double()[:, q.g_idx.long()]
        # Half a step, except at the top of a symmetric range, which has one code less than the bottom;
        # and a little for the range's float16 rounding.
        assert ((W - q.dequantize()).abs() <= step * 0.52).float().mean() > 0.99
        assert q.relative_error is None


RECIPES = [{"recipe": "best"}, {"recipe": "textbook"}]


def checked(q: QuantizedWeight) -> QuantizedWeight:
    """Codes are on the grid, scales finite and not zero, and stored values finite."""
    assert int(q.codes.max()) < 2**q.bits
    assert torch.isfinite(q.scales).all()
    assert (q.scales != 0).all()
    assert torch.isfinite(q.dequantize()).all()
    return q


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]), sym=st.booleans(),
    group=st.sampled_from([16, 32, -1]), width=st.sampled_from([32, 64, 96]), rows=st.integers(1, 40),
)  # fmt: skip
def test_the_default_recipe_never_loses_more_than_rounding(seed, bits, sym, group, width, rows):
    W, H = layer(seed, rows, width)
    config = QuantizeConfig(bits=bits, sym=sym, group_size=group)
    q, nearest = checked(solve(W, H, config)), round_to_nearest(W, config)
    ours, theirs = (output_error(W, x.dequantize().double(), H) for x in (q, nearest))
    assert ours <= theirs * (1 + 1e-6)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    settings=st.sampled_from(
        [
            {"sym": False}, {"grid": "minmax"}, {"recipe": "textbook"},
            {"sym": False, "grid": "mse"}, {"positive_scales": True},
            {"positive_scales": True, "order": "static"},
        ]
    ),
)  # fmt: skip
def test_scales_are_positive_where_no_range_can_be_flipped(seed, bits, settings):
    W, H = layer(seed, 24, 64)
    assert (
        checked(solve(W, H, QuantizeConfig(bits=bits, group_size=32, **settings))).scales > 0
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
        q = checked(solve(W.to(dtype), H.to(dtype), config))
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
        q = checked(solve(W.to(dtype), H.to(dtype), config))
        assert len(q.damp_tried) > 1
        with pytest.raises(SingularError, match=r"indefinite|zero"):
            solve(W.to(dtype), -H.to(dtype), config)

    @pytest.mark.parametrize("size", [1e-6, 1e-9, 1e-30])
    def test_weights_whose_steps_do_not_fit_float16(self, size, dtype, recipe):
        """Steps below 6e-8 vanish in float16; scales are then its smallest value."""
        W, H = layer(0, 16, 64)
        config = QuantizeConfig(bits=4, group_size=32, **recipe)
        q = checked(solve((size * W).to(dtype), H.to(dtype), config))
        assert float(q.dequantize().abs().max()) < 1e-5

    def test_weights_beyond_float16(self, dtype, recipe):
        W, H = layer(0, 16, 64)
        config = QuantizeConfig(bits=4, group_size=32, **recipe)
        with pytest.raises(NumericalError, match="does not fit float16"):
            solve((1e9 * W).to(dtype), H.to(dtype), config)
