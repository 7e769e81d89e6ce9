"""Damping chosen by what it does to tokens that were not calibrated on.

Ĥ = H + λ · mean(diag H) · I: a small λ trusts the calibration tokens to the last direction, a large one
moves towards rounding to nearest. How much trust they deserve, other tokens tell: with H and the drift
taken from one part of them, and Q solved with each λ, the one is taken whose loss on the held-out part,

    ||X Qᵀ - (X Wᵀ + Z)||² / n = tr(E H Eᵀ) - 2 tr(E Yᵀ) + …,    E = Q - W,  Y = ZᵀX / n

is least, where Z is what earlier layers lost (core.correct): a ridge parameter chosen on held-out data,
as for any other regression. Then all tokens are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.drift import Moments
from roundwise.core.solver import prepare_hessian, sample_rows, solve

#: Dampings compared.
DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1)
#: What is left out of the recipe meanwhile.
QUICK = {"grid_candidates": 1, "refine": 0}


def held_out_losses(
    weights: Sequence[tuple[torch.Tensor, QuantizeConfig]], fit: Moments, held: Moments
) -> dict[float, float]:
    """Loss on the held-out tokens for each damping, of weights that read the same input.

    Args:
        weights: W [out, in] and its settings, each; their relative losses are summed.
        fit: moments of the tokens to solve with.
        held: moments of the others.

    Returns:
        Damping -> loss; it may be negative, as a constant is left out.

    Raises:
        SingularError: no calibration token reached the layer, or H stays indefinite.
    """
    losses = {}
    for damping in DAMPINGS:
        losses[damping] = 0.0
        for W, settings in weights:
            changed = settings.merged({**QUICK, "damp_percent": damping})
            losses[damping] += _loss(W, changed, fit, held)
    return losses


def _loss(W: torch.Tensor, settings: QuantizeConfig, fit: Moments, held: Moments) -> float:
    rows = sample_rows(W)
    W = W[rows].to(torch.float32)
    alpha, beta = settings.alpha, settings.beta
    target_shift, missed = (
        part.drift.rows(rows).take_target_shift(W, alpha, beta) for part in (fit, held)
    )
    q = solve(W, prepare_hessian(fit.H, settings), settings, target_shift=target_shift)
    E, H = q.dequantize() - W, held.H.to(torch.float32)
    loss = float(((E @ H) * E).sum())
    if missed is not None:
        loss -= 2 * float((E * missed.to(torch.float32)).sum())
    return loss / (float(((W @ H) * W).sum()) or 1.0)
