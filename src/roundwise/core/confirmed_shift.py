"""Confirmed shift: the part of a target shift that tokens confirm to which it was not fitted.

The correction for the errors of earlier layers (`core.drift`) is a regression of the lost output Z on
the layer's input X: D = Y Ĥ⁻¹ with Y = ZᵀX / n. With few tokens for the width of X it also fits noise,
which costs on other text. On tokens that the regression has not seen, the loss of a part s of it is

    ||s X Dᵀ - Z||² / n = s² tr(D H Dᵀ) - 2 s tr(D Yᵀ) + const

with the moments H and Y of those tokens; it is least at s = tr(D Yᵀ) / tr(D H Dᵀ), cut to 0 … 1.

That is e / (e + v) for a true effect e and noise v, and v falls as 1/n. The shift that is used in the
end is fitted to all tokens, m instead of n, so its best part is e / (e + v n/m)
= 1 / (1 + (1/s - 1) n/m).
"""

from __future__ import annotations

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.drift import Moments, corrected_target
from roundwise.core.solver import PreparedHessian, sample_rows


def confirmed_part(
    W: torch.Tensor,
    settings: QuantizeConfig,
    fit: Moments,
    prepared: PreparedHessian,
    held: Moments,
) -> float | None:
    """Returns the part of the target shift, 0 to 1, that is best on tokens that it is not fitted to.

    Args:
        W: weight [out, in], any float dtype; some of its rows are looked at.
        settings: `alpha` and `beta` are used.
        fit: moments of the tokens that the shift is fitted to; not changed.
        prepared: Hessian of these tokens, with its factor.
        held: moments of the held-out tokens; not changed.

    Returns:
        None: there is nothing to correct.
    """
    rows = sample_rows(W)
    W = W[rows].to(torch.float32)
    Y, held_Y = (
        part.drift.rows(rows).take_target_shift(W, settings.alpha, settings.beta)
        for part in (fit, held)
    )
    if Y is None or held_Y is None:
        return None
    D = corrected_target(W, Y, prepared.order.perm, prepared.factor).to(torch.float32) - W
    confirmed = float((D * held_Y.to(torch.float32)).sum())
    size = float(((D @ held.H.to(torch.float32)) * D).sum())
    if confirmed <= 0 or size <= 0:
        return 0.0
    noise = max(0.0, size / confirmed - 1) * fit.tokens / (fit.tokens + held.tokens)
    return 1 / (1 + noise)
