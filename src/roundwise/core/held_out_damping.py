"""Damping chosen on held-out calibration tokens, as a ridge parameter in any other regression.

Ĥ = H + λ · mean(diag H) · I: a small λ trusts the calibration tokens even in directions that they hardly
show, a large one moves towards rounding to nearest. H and the drift are taken from one part of the
tokens, Q is solved with each λ, and the λ is chosen whose loss on the held-out part is least:

    ||X Qᵀ - (X Wᵀ + Z)||² / n = tr(E H Eᵀ) - 2 tr(E Yᵀ) + const,    E = Q - W,  Y = ZᵀX / n

where Z is the output that earlier layers' errors took away (`core.drift`). Then all tokens are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.drift import Moments
from roundwise.core.solver import prepare_hessian, sample_rows, solve

#: Dampings compared.
DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1)
#: Settings that make the comparison of dampings quicker.
QUICK = {"grid_candidates": 1, "refine": 0}


def held_out_losses(
    weights: Sequence[tuple[torch.Tensor, QuantizeConfig]], fit: Moments, held: Moments
) -> dict[float, float]:
    """Returns the loss on held-out tokens with each damping, for weights that read the same input.

    Args:
        weights: pairs of W [out, in] and its settings; their relative losses are summed.
        fit: moments of the tokens to solve with.
        held: moments of the held-out tokens.

    Returns:
        Loss by damping; it may be negative, since the constant is left out.

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
    """Returns the held-out loss of some rows of one weight, relative to tr(W H Wᵀ)."""
    rows = sample_rows(W)
    W = W[rows].to(torch.float32)
    alpha, beta = settings.alpha, settings.beta
    target_shift, held_shift = (
        part.drift.rows(rows).take_target_shift(W, alpha, beta) for part in (fit, held)
    )
    q = solve(W, prepare_hessian(fit.H, settings), settings, target_shift=target_shift)
    E, H = q.dequantize() - W, held.H.to(torch.float32)
    loss = float(((E @ H) * E).sum())
    if held_shift is not None:
        loss -= 2 * float((E * held_shift.to(torch.float32)).sum())
    return loss / (float(((W @ H) * W).sum()) or 1.0)
