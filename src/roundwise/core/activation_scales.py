"""Activation-aware scales: enlarges the input channels with large activations before rounding (AWQ).

Multiplying column j of W by s_j and dividing its input by s_j does not change the layer, but column j is
then rounded with a step s_j times finer, at the cost of the other columns of its group (AWQ, Lin et al.
2023, arXiv 2306.00978). With a_j the size of the activations of channel j,

    s = a^r / √(max a^r · min a^r),    r the ratio whose loss tr(E H Eᵀ) is least, of 0, 0.05 … 0.95

a_j = √H_jj, the root mean square, replaces the paper's mean of |X_j|: it is known already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.quantized_weight import QuantizedWeight
from roundwise.core.solver import grid_spec, round_to_nearest, sample_rows, solve
from roundwise.errors import SingularError

#: Ratios tried.
RATIOS = [i / 20 for i in range(20)]
#: Settings, by method, that make the comparison of ratios quicker.
QUICK: dict[str, dict[str, Any]] = {
    "awq": {"grid": "minmax"},
    "gptq": {"grid_candidates": 1, "refine": 0},
}
#: Smallest activation size used, as a part of their mean: a channel may never be active.
FLOOR = 1e-4


class Scales(NamedTuple):
    """The best scales for the weights that read one input."""

    s: torch.Tensor
    """float32 [in], positive."""
    ratio: float
    """The ratio r; 0: no scaling is better."""
    gain: float
    """Loss with the scales over loss without, on the rows compared."""


def channel_scales(H: torch.Tensor, ratio: float) -> torch.Tensor:
    """Returns the scales s [in] of one ratio, from the Hessian H [in, in]."""
    size = H.diagonal().clamp(min=0.0).sqrt()
    size = size.clamp(min=FLOOR * float(size.mean())).pow(ratio)
    return size / (size.max() * size.min()).sqrt()


def search_scales(
    weights: Sequence[tuple[torch.Tensor, QuantizeConfig]], H: torch.Tensor
) -> Scales:
    """Searches the scales with the least loss, summed over all weights that read one input.

    Each ratio is tried on a few rows with the method that will quantize the weights: an error that
    GPTQ corrects anyway is not worth a scale.

    Args:
        weights: pairs of W [out, in] and its settings; their relative losses are summed.
        H: Hessian [in, in] of their input.

    Raises:
        SingularError: H is zero: no calibration token reached the layer.
    """
    if not float(H.diagonal().sum()) > 0.0:
        raise SingularError("the Hessian is zero: no calibration input reached this layer")
    H = H.to(torch.float32)
    parts = [(W[sample_rows(W)].to(torch.float32), settings) for W, settings in weights]
    losses = []
    for ratio in RATIOS:
        s = channel_scales(H, ratio)
        scaled = H / s / s[:, None]
        losses.append(sum(_loss(W * s, scaled, settings) for W, settings in parts))
    best = min(range(len(RATIOS)), key=losses.__getitem__)
    gain = losses[best] / losses[0] if losses[0] > 0 else 1.0
    return Scales(channel_scales(H, RATIOS[best]), RATIOS[best], gain)


def _loss(W: torch.Tensor, H: torch.Tensor, settings: QuantizeConfig) -> float:
    """Returns tr(E H Eᵀ) / tr(W H Wᵀ) for some rows of a scaled weight, with H of the scaled input."""
    quick = settings.merged(QUICK[settings.method])
    q = round_searched(W, H, quick) if settings.method == "awq" else solve(W, H, quick)
    assert q.relative_error is not None
    return q.relative_error


def round_searched(W: torch.Tensor, H: torch.Tensor, config: QuantizeConfig) -> QuantizedWeight:
    """Rounds to nearest, on the grids whose squared errors, weighed by H_jj, are least.

    Args:
        W: weight [out, in].
        H: Hessian [in, in] of its input.
        config: `bits`, `group_size`, `sym`, `format`, `positive_scales` and `grid` are used; with
            grid="minmax" there is no search.

    Raises:
        SingularError: H is zero.
    """
    mean = float(H.diagonal().mean())
    if not mean > 0.0:
        raise SingularError("the Hessian is zero: no calibration input reached this layer")
    W, H = W.to(torch.float32), H.to(torch.float32)
    pivots = H.diagonal().clamp(min=1e-6 * mean)
    weights = grid_spec(config).error_weights(pivots)
    q = round_to_nearest(W, config, weights=weights)
    loss, energy = (float(((X @ H) * X).sum()) for X in (W - q.dequantize(), W))
    error = max(loss, 0.0) / energy if energy > 0 else 0.0
    return replace(q, relative_error=error, energy=energy)
