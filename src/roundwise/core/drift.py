"""Correcting for what earlier layers lost: aim at the original output, on the input that is there.

Quantized predecessors hand a layer the input X instead of the original model's X̃. Minimising
||X Qᵀ - X̃ Wᵀ||² instead of ||X Qᵀ - X Wᵀ||² is the same problem with another target,

    T = W + Y Ĥ⁻¹,    Y = α · W (X̃ - X)ᵀX/n  (α = 1)

(asymmetric calibration: GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695; here for the whole matrix at
once). A layer that writes into the residual stream can also make up for the drift of the stream it adds
to, from R̃ to R: Y gains β · (R̃ - R)ᵀX/n. In both, Y = (output wanted - output now)ᵀX/n is all that
the solver needs to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from roundwise.core.act_order import permuted_columns
from roundwise.core.linalg import Factor, add_matmul

#: Rows of a weight converted at a time.
ROWS = 512


@dataclass
class Drift:
    """Cross moments of a layer's input X [tokens, in] with its distance from the original model."""

    input: torch.Tensor | None = None
    """(X̃ - X)ᵀX / n, [in, in]."""
    residual: torch.Tensor | None = None
    """(R̃ - R)ᵀX / n, [out, in], where the layer's output is added to the residual stream R.

    The input's drift may be in here instead, as far as it reaches the output: (X̃ - X) Wᵀ α/β is then
    added to R̃ - R, which takes [out, in] instead of [in, in], and fewer operations: X̃Wᵀ is what the
    original model returns there, and of X Wᵀ there remains W H (`subtract_output`).
    """

    def subtract_output(self, W: torch.Tensor, H: torch.Tensor, ratio: float) -> None:
        """Makes X̃ Wᵀ in `residual` (X̃ - X) Wᵀ: takes ratio · W H away, in place.

        Args:
            W: weight [out, in], any float dtype.
            H: XᵀX / n [in, in] over the same tokens.
            ratio: α/β, with which X̃ Wᵀ was added.
        """
        if self.residual is not None:
            for rows, part in _together(self.residual, W):
                add_matmul(rows, part.to(H.dtype), H, -ratio)

    def rows(self, rows: slice) -> Drift:
        """What concerns some rows of the weight; `residual` is a copy."""
        residual = None if self.residual is None else self.residual[rows].clone()
        return Drift(self.input, residual)

    def take_target_shift(self, W: torch.Tensor, alpha: float, beta: float) -> torch.Tensor | None:
        """Y [out, in] = (output wanted - output now)ᵀX / n, in the moments' dtype. Ends `residual`.

        Args:
            W: weight [out, in], any float dtype.
            alpha: strength of the input's correction, 0 … 1.
            beta: strength of the residual stream's correction, 0 … 1.

        Returns:
            None when there is nothing to make up for.
        """
        Y, self.residual = self.residual, None
        if Y is not None:
            Y.mul_(beta)
        if self.input is not None and alpha:
            if Y is None:
                Y = self.input.new_zeros(W.shape)
            for rows, part in _together(Y, W):
                add_matmul(rows, part.to(Y.dtype), self.input, alpha)
        return Y


@dataclass
class Moments:
    """What is summed up about a layer's input over some tokens."""

    H: torch.Tensor
    """XᵀX / n, [in, in]."""
    drift: Drift
    tokens: int

    def divide(self, s: torch.Tensor) -> None:
        """Makes them the moments of X diag(1/s), in place, for s [in]."""
        s = s.to(self.H.dtype)
        for square in (self.H, self.drift.input):
            if square is not None:
                square.div_(s).div_(s[:, None])
        if self.drift.residual is not None:
            self.drift.residual.div_(s)

    def join(self, other: Moments) -> None:
        """Makes them the moments over both parts of the tokens, in place."""
        part = other.tokens / (self.tokens + other.tokens)
        self.H.lerp_(other.H, part)
        drift = self.drift
        for name in ("input", "residual"):
            mine, theirs = getattr(drift, name), getattr(other.drift, name)
            if mine is None and theirs is not None:
                setattr(drift, name, theirs * part)
            elif mine is not None:
                mine.lerp_(torch.zeros_like(mine) if theirs is None else theirs, part)
        self.tokens += other.tokens


def corrected_target(
    W: torch.Tensor, Y: torch.Tensor, perm: torch.Tensor, F: Factor
) -> torch.Tensor:
    """The target T = W + Y Ĥ⁻¹ [out, in] in channel order.

    Args:
        W: weight [out, in], any float dtype.
        Y: what is to be made up for [out, in], see `Drift.target_shift`; overwritten by T.
        perm: int64 [in], the processing order that F is in.
        F: factor of Ĥ.
    """
    for rows, part in _together(Y, W):
        answer = F.solve(permuted_columns(rows, perm))
        rows.copy_(part)
        rows[:, perm] += answer.T
    return Y


def _together(Y: torch.Tensor, W: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same rows of both, some at a time, as views."""
    return zip(torch.split(Y, ROWS), torch.split(W, ROWS), strict=True)
