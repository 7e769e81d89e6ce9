"""Rows answer to each other's errors: the loss weighed by B falls, and without B nothing changes."""

from __future__ import annotations

import pytest
import torch

import roundwise as rw
from roundwise.core.output_weighting import DAMP, OutputWeighting
from roundwise.core.solver import prepare_hessian, solve
from roundwise.errors import NumericalError, SingularError


def problem(out: int = 96, width: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W, H and B of a layer whose inputs, and whose outputs' gradients, are correlated."""
    X = torch.randn(512, width, dtype=torch.float64) @ torch.randn(width, width).double()
    g = torch.randn(512, out, dtype=torch.float64) @ torch.randn(out, out).double()
    W = torch.randn(out, width, dtype=torch.float64)
    return W, X.T @ X / 512, g.T @ g / 512


def weighed(E: torch.Tensor, H: torch.Tensor, B: torch.Tensor) -> float:
    """tr(B E H Eᵀ)."""
    return float(((B @ E) * (E @ H)).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    "settings", [{}, {"sym": False}, {"desc_act": True}, {"recipe": "textbook"}]
)
def test_the_weighed_loss_falls(bits, settings):
    W, H, B = problem()
    config = rw.QuantizeConfig(bits=bits, group_size=32, **settings)
    alone, weighted = solve(W, H, config), solve(W, H, config, outputs=B)
    losses = [weighed(W - q.dequantize(torch.float64), H, B) for q in (alone, weighted)]
    assert losses[1] < 0.8 * losses[0]
    assert weighted.relative_error > alone.relative_error  # which counts each row by itself


def test_a_factor_changes_nothing():
    W, H, B = problem()
    config = rw.QuantizeConfig(bits=3, group_size=32)
    one, other = solve(W, H, config, outputs=B), solve(W, H, config, outputs=1024 * B)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)


def test_outputs_that_are_alike_are_solved_independently():
    W, H, _ = problem()
    config = rw.QuantizeConfig(bits=3, group_size=32)
    alone = solve(W, H, config)
    weighted = solve(W, H, config, outputs=torch.eye(len(W), dtype=torch.float64))
    assert torch.equal(alone.codes, weighted.codes)
    assert torch.equal(alone.scales, weighted.scales)
    assert weighted.relative_error == pytest.approx(alone.relative_error)


def test_each_part_answers_to_those_before():
    W, H, B = problem()
    config = rw.QuantizeConfig(bits=3, group_size=32)
    H = prepare_hessian(H, config)
    weighting = OutputWeighting(B, W.shape[1])
    T, codes = W.clone(), torch.empty_like(W, dtype=torch.uint8)
    damped = B + DAMP * B.diagonal().mean() * torch.eye(len(B), dtype=torch.float64)
    before: list[int] = []
    for rows in weighting.row_blocks(len(W)):
        if before:
            # The best answer of all later rows r together: B_rr⁻¹ B_rb (T_b - Q_b).
            later = [r for r in weighting.perm.tolist() if r not in before]
            answer = torch.linalg.solve(
                damped[later][:, later], damped[later][:, before] @ T[before]
            )
            assert torch.allclose(weighting.feedback(), answer[: len(rows)], rtol=1e-6, atol=1e-9)
        q = solve(W[rows] + weighting.feedback(), H, config)
        codes[rows] = q.codes
        T[rows] = W[rows] - q.dequantize(torch.float64)  # from here on, their errors
        weighting.record_errors(T[rows])
        before += rows.tolist()
    assert torch.equal(codes, solve(W, H, config, outputs=B).codes)


def test_drift_is_corrected_too():
    W, H, B = problem()
    config = rw.QuantizeConfig(bits=3, group_size=32)
    target_shift = 0.05 * torch.randn_like(W) @ H
    T = (
        W
        + torch.linalg.solve(
            H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64), target_shift.T
        ).T
    )
    aimed, ignored = (
        weighed(T - solve(W, H, config, target_shift=y, outputs=B).dequantize(torch.float64), H, B)
        for y in (target_shift, None)
    )
    assert aimed < ignored


def test_gradients_that_are_zero_or_nan_are_errors():
    W, H, B = problem()
    with pytest.raises(SingularError):
        solve(W, H, outputs=0 * B)
    with pytest.raises(NumericalError):
        solve(W, H, outputs=B * float("nan"))
