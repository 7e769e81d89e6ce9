"""Correcting for what earlier layers lost: aim at the original output, on the input that is there.

Quantized predecessors hand a layer the input X instead of the original model's X̃. Minimising
||X Qᵀ - X̃ Wᵀ||² instead of ||X Qᵀ - X Wᵀ||² is the same problem with another target,

    T = W + α · W (X̃ - X)ᵀX/n · Ĥ⁻¹  (α = 1)

(asymmetric calibration: GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695; here for the whole matrix at
once). A layer that writes into the residual stream can also make up for the drift of the stream it adds
to, from R̃ to R: + β · (R̃ - R)ᵀX/n · Ĥ⁻¹.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from roundwise.core.factor import Factor


@dataclass
class Drift:
    """Cross moments of a layer's input X [tokens, in] with its distance from the original model."""

    input: torch.Tensor | None = None
    """(X̃ - X)ᵀX / n, [in, in]."""
    residual: torch.Tensor | None = None
    """(R̃ - R)ᵀX / n, [out, in], where the layer's output is added to the residual stream R."""

    def rows(self, part: slice) -> Drift:
        """The drift that concerns some rows of the weight."""
        return Drift(self.input, None if self.residual is None else self.residual[part])


def corrected(
    W: torch.Tensor, drift: Drift, perm: torch.Tensor, F: Factor, alpha: float, beta: float
) -> torch.Tensor:
    """The target T [out, in] in channel order.

    Args:
        W: weight [out, in].
        drift: cross moments; a missing one counts as zero.
        perm: int64 [in], the processing order that F is in.
        F: factor of Ĥ.
        alpha: strength of the input's correction, 0 … 1.
        beta: strength of the residual stream's correction, 0 … 1.
    """
    Y = torch.zeros_like(W)
    if drift.input is not None and alpha:
        Y.addmm_(W, drift.input.to(W.dtype), alpha=alpha)
    if drift.residual is not None and beta:
        Y.add_(drift.residual.to(W.dtype), alpha=beta)
    T = W.clone()
    T[:, perm] += F.divide(Y[:, perm])
    return T
