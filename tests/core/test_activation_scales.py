"""Activation-aware scales make rounding to nearest lose less, and never more."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundwise.config import QuantizeConfig
from roundwise.core.activation_scales import (
    QUICK,
    RATIOS,
    channel_scales,
    round_searched,
    search_scales,
)
from roundwise.core.grid import GridSpec, minmax
from roundwise.core.solver import round_to_nearest, solve
from roundwise.errors import SingularError

CONFIG = QuantizeConfig(group_size=32)
AWQ = QuantizeConfig(group_size=32, method="awq")
BOTH = pytest.mark.parametrize("config", [AWQ, CONFIG], ids=["awq", "gptq"])


def layer(seed: int = 0, *, outliers: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of inputs with a few channels far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(48, 64, generator=generator)
    X = torch.randn(512, 64, generator=generator)
    if outliers:
        X[:, [3, 20, 47]] *= 30
    return W, X.T @ X / len(X)


def loss(W: torch.Tensor, Q: torch.Tensor, H: torch.Tensor) -> float:
    E = (W - Q).double()
    return float(torch.trace(E @ H.double() @ E.T))


def scaled_loss(W: torch.Tensor, s: torch.Tensor, H: torch.Tensor, config: QuantizeConfig) -> float:
    """On the unscaled input: what the scaled and rounded weight stands for there."""
    scaled = H / s / s[:, None]
    quick = config.merged(QUICK[config.method])
    q = (round_searched if config.method == "awq" else solve)(W * s, scaled, quick)
    return loss(W, q.dequantize() / s, H)


class TestScales:
    """Scales of input channels."""

    @given(st.integers(0, 100), st.sampled_from(RATIOS))
    def test_are_those_of_the_paper(self, seed: int, ratio: float) -> None:
        _, H = layer(seed)
        s = channel_scales(H, ratio)
        size = H.diagonal().sqrt() ** ratio
        torch.testing.assert_close(s, size / (size.max() * size.min()).sqrt())
        torch.testing.assert_close(s.max() * s.min(), torch.tensor(1.0))

    def test_ratio_zero_scales_nothing(self) -> None:
        assert torch.equal(channel_scales(layer()[1], 0.0), torch.ones(64))

    def test_a_silent_channel_has_a_finite_scale(self) -> None:
        _, H = layer()
        H[7], H[:, 7] = 0.0, 0.0
        s = channel_scales(H, 0.95)
        assert bool(torch.isfinite(s).all())
        assert bool((s > 0).all())

    @BOTH
    def test_are_the_best_of_all_ratios(self, config: QuantizeConfig) -> None:
        W, H = layer()
        found = search_scales([(W, config)], H)
        losses = {r: scaled_loss(W, channel_scales(H, r), H, config) for r in RATIOS}
        assert found.ratio == min(losses, key=losses.__getitem__) > 0
        assert found.gain == pytest.approx(losses[found.ratio] / losses[0.0], rel=1e-3)
        assert torch.equal(found.s, channel_scales(H, found.ratio))

    @BOTH
    def test_pay_where_channels_carry_unequally(self, config: QuantizeConfig) -> None:
        W, H = layer()
        assert search_scales([(W, config)], H).gain < 0.6

    @pytest.mark.parametrize("seed", range(5))
    @BOTH
    def test_never_lose_more_than_none(self, config: QuantizeConfig, seed: int) -> None:
        W, H = layer(seed, outliers=False)
        found = search_scales([(W, config)], H)
        assert found.gain <= 1.0
        plain = scaled_loss(W, torch.ones(64), H, config)
        assert scaled_loss(W, found.s, H, config) <= plain * (1 + 1e-4)

    def test_weights_of_one_input_share_them(self) -> None:
        W, H = layer()
        other = 100 * layer(1)[0]
        both = search_scales([(W, AWQ), (other, AWQ)], H)
        # Counted by relative loss: a large weight does not drown a small one.
        alike = search_scales([(W, AWQ), (other / 100, AWQ)], H)
        assert both.ratio == alike.ratio

    def test_need_activations(self) -> None:
        with pytest.raises(SingularError, match="no calibration input reached"):
            search_scales([(layer()[0], CONFIG)], torch.zeros(64, 64))


class TestRoundSearched:
    """Rounding to nearest on searched grids."""

    @pytest.mark.parametrize("sym", [True, False])
    @pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
    def test_each_weight_goes_to_the_nearest_point(self, bits: int, sym: bool) -> None:
        W, H = layer()
        config = QuantizeConfig(bits=bits, group_size=32, sym=sym)
        q = round_searched(W, H, config)
        scales, zeros = (t.float()[:, q.g_idx.long()] for t in (q.scales, q.zeros))
        grid = torch.arange(config.maxq + 1).view(-1, 1, 1)
        distances = ((grid - zeros) * scales - W).abs()
        assert bool((distances.gather(0, q.codes.long()[None]) <= distances.amin(0) + 1e-5).all())

    @settings(deadline=None)
    @given(st.integers(0, 50))
    def test_loses_less_than_minmax(self, seed: int) -> None:
        W, H = layer(seed)
        diagonal = torch.diag(H.diagonal())
        searched = round_searched(W, H, CONFIG).dequantize()
        plain = round_to_nearest(W, CONFIG).dequantize()
        assert loss(W, searched, diagonal) <= loss(W, plain, diagonal)

    def test_minmax_searches_nothing(self) -> None:
        W, H = layer()
        config = CONFIG.merged({"grid": "minmax"})
        q, plain = round_searched(W, H, config), round_to_nearest(W, config)
        assert torch.equal(q.codes, plain.codes)
        assert torch.equal(q.scales[:, 0].float(), minmax(W[:, :32], GridSpec(4, sym=True)).scale)

    def test_reports_what_it_lost(self) -> None:
        W, H = layer()
        q = round_searched(W, H, CONFIG)
        Q = q.dequantize()
        assert q.relative_error == pytest.approx(
            loss(W, Q, H) / loss(W, torch.zeros_like(W), H), rel=1e-4
        )
        assert q.weight_error == pytest.approx(
            float((W - Q).square().sum() / W.square().sum()), rel=1e-4
        )
        assert solve(W, H, CONFIG).relative_error < q.relative_error  # type: ignore[operator]

    def test_needs_activations(self) -> None:
        with pytest.raises(SingularError, match="no calibration input reached"):
            round_searched(layer()[0], torch.zeros(64, 64), CONFIG)
