"""A sweep over the columns: the feedback, the loss, and the way back to the original order."""

from __future__ import annotations

import pytest
import torch

from roundwise import QuantizeConfig
from roundwise.core import rounding
from roundwise.core.backends.base import PANEL
from roundwise.core.backends.reference import TorchBackend
from roundwise.core.grid import Grid
from roundwise.core.linalg import permuted_columns
from roundwise.core.rounding import ColumnSweep
from roundwise.core.solver import grid_spec, prepare_hessian, round_to_nearest
from tests.core.oracle import damped, output_error
from tests.core.problems import layer

SETTINGS = [
    {"order": "natural"},
    {"order": "group_aware"},
    {"desc_act": True},
    {"order": "natural", "grid": "minmax"},
    {"order": "static"},
    {"order": "static", "group_size": -1},
]


def swept(
    W: torch.Tensor, H: torch.Tensor, **settings: object
) -> tuple[ColumnSweep, QuantizeConfig]:
    """A finished sweep, with grids of rounding to nearest where the order needs known ones."""
    config = QuantizeConfig(**{"bits": 3, "group_size": 24, **settings})
    prepared, grids = prepare_hessian(H, config), None
    if prepared.order.fixed_grids:
        nearest = round_to_nearest(W, config)
        grids = Grid(nearest.scales, nearest.zeros)
    sweep = ColumnSweep(
        permuted_columns(W, prepared.order.perm), prepared.factor, prepared.order,
        grid_spec(config), grids, TorchBackend(),
    )  # fmt: skip
    sweep.round_all()
    return sweep, config


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("look_back", [1, 50, 512])
def test_each_column_is_rounded_with_the_feedback_of_all_before_it(
    settings: dict, look_back: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q_j is the grid point nearest to t_j = T_j + Σ_{i<j} E_i U[i, j], however sums are cut."""
    monkeypatch.setattr(rounding, "LOOK_BACK", look_back)
    W, H = layer(0, rows=5, width=PANEL + 40)
    sweep, config = swept(W, H, **settings)
    U, group = sweep.F.U, sweep.order.group
    t = sweep.Tt + U.triu(1).T @ sweep.E
    scale, zero = sweep.grids.scale[group], sweep.grids.zero[group]
    nearest = (t / scale).round().add(zero).clamp(0, config.maxq)
    assert torch.equal(sweep.codes.double(), nearest)
    torch.testing.assert_close(sweep.E, sweep.Tt - scale * (nearest - zero))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_loss_is_that_of_the_damped_hessian(settings: dict) -> None:
    W, H = layer(1, rows=5, width=96)
    sweep, _ = swept(W, H, **settings)
    Q = sweep.result().dequantize(torch.float64)
    assert sweep.loss == pytest.approx(output_error(W, Q, damped(H, 0.01)), rel=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_result_is_in_the_original_order(settings: dict) -> None:
    W, H = layer(2, rows=5, width=96)
    sweep, config = swept(W, H, **settings)
    q = sweep.result()
    E = torch.empty_like(W)
    E[:, sweep.order.perm] = sweep.E.T
    torch.testing.assert_close(W - q.dequantize(torch.float64), E)
    assert torch.equal(q.g_idx, sweep.order.g_idx)
    assert (q.bits, q.damp_percent, q.damp_tried) == (3, 0.01, (0.01,))
    assert q.scales.shape == q.zeros.shape == (5, config.groups(96))
