"""Drift: corrects a layer for the errors of the layers before it (asymmetric calibration).

Quantized predecessors give a layer the input X instead of the original model's X̃. To reproduce the
original output from the input X, minimise ||X Qᵀ - X̃ Wᵀ||² instead of ||X Qᵀ - X Wᵀ||²: the same problem
with another target,

    T = W + Y Ĥ⁻¹,    Y = α · W (X̃ - X)ᵀX/n  (α = 1)

(GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695; here for the whole matrix at once). A layer that
writes into the residual stream can also correct the drift of the stream from R̃ to R: Y gains
β · (R̃ - R)ᵀX/n. In both cases the target shift Y = (wanted output - present output)ᵀX/n is all that the
solver needs to know.

This is a regression of the lost output Z on X. With few tokens for the width of X it also fits noise,
and costs on other text. On tokens that D = Y Ĥ⁻¹ is not fitted to, the loss of a part s of it is

    ||s X Dᵀ - Z||² / n = s² tr(D H Dᵀ) - 2 s tr(D Yᵀ) + const

with the moments H and Y of those tokens; it is least at s = tr(D Yᵀ) / tr(D H Dᵀ), cut to 0 … 1. That is
e / (e + v) for a true effect e and noise v, and v falls as 1/n. The shift that is used in the end is
fitted to all tokens, m instead of n: its best part is e / (e + v n/m) = 1 / (1 + (1/s - 1) n/m).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from roundwise.core.linalg import Factor, add_matmul, permuted_columns

#: Rows of a weight converted at a time.
ROWS = 512


@dataclass
class Drift:
    """Cross moments of a layer's input X [tokens, in] with its distance from the original model."""

    input: torch.Tensor | None = None
    """(X̃ - X)ᵀX / n, [in, in]."""
    residual: torch.Tensor | None = None
    """(R̃ - R)ᵀX / n, [out, in], where the layer's output is added to the residual stream R.

    It can include the effect of the input's drift on the output: α/β · (X̃ - X) Wᵀ is then added to
    R̃ - R, which takes [out, in] instead of [in, in], and fewer operations: X̃ Wᵀ is the layer's output
    in the original model, and X Wᵀ is subtracted at the end as W H (`subtract_output`).
    """

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to correct."""
        return self.input is None and self.residual is None

    def subtract_output(self, W: torch.Tensor, H: torch.Tensor, ratio: float) -> None:
        """Subtracts ratio · W H from `residual` in place, which turns X̃ Wᵀ in it into (X̃ - X) Wᵀ.

        Args:
            W: weight [out, in], any float dtype.
            H: XᵀX / n [in, in] over the same tokens.
            ratio: α/β, the factor with which X̃ Wᵀ was added.
        """
        if self.residual is not None:
            for rows, part in _row_parts(self.residual, W):
                add_matmul(rows, part.to(H.dtype), H, -ratio)

    def rows(self, rows: slice) -> Drift:
        """Returns the drift for some rows of the weight; `residual` is a copy, `input` is shared."""
        residual = None if self.residual is None else self.residual[rows].clone()
        return Drift(self.input, residual)

    def take_target_shift(self, W: torch.Tensor, alpha: float, beta: float) -> torch.Tensor | None:
        """Returns Y = (wanted output - present output)ᵀX / n, in the memory of `residual`.

        Args:
            W: weight [out, in], any float dtype.
            alpha: strength of the input's correction, 0 … 1.
            beta: strength of the residual stream's correction, 0 … 1.

        Returns:
            [out, in], in the moments' dtype; None if there is nothing to correct.
        """
        Y, self.residual = self.residual, None
        if Y is not None:
            Y.mul_(beta)
        if self.input is not None and alpha:
            if Y is None:
                Y = self.input.new_zeros(W.shape)
            for rows, part in _row_parts(Y, W):
                add_matmul(rows, part.to(Y.dtype), self.input, alpha)
        return Y


@dataclass
class Moments:
    """Statistics of a layer's input X over some tokens: all that its weights are solved with."""

    H: torch.Tensor
    """XᵀX / n, [in, in]."""
    drift: Drift
    """Distance from the original model over the same tokens."""
    tokens: int
    """Number n of tokens."""

    def divide(self, s: torch.Tensor) -> None:
        """Turns these into the moments of X diag(1/s), in place, for s [in]."""
        s = s.to(self.H.dtype)
        for square in (self.H, self.drift.input):
            if square is not None:
                square.div_(s).div_(s[:, None])
        if self.drift.residual is not None:
            self.drift.residual.div_(s)

    def join(self, other: Moments) -> None:
        """Turns these into the moments over both sets of tokens, in place."""
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
    """Returns the target T = W + Y Ĥ⁻¹ [out, in] in channel order, in the memory of Y.

    Args:
        W: weight [out, in], any float dtype.
        Y: target shift [out, in], see `Drift.take_target_shift`; overwritten by T.
        perm: int64 [in], the processing order of F.
        F: factor of Ĥ.
    """
    for rows, part in _row_parts(Y, W):
        correction = F.solve(permuted_columns(rows, perm))
        rows.copy_(part)
        rows[:, perm] += correction.T
    return Y


def confirmed_part(
    W: torch.Tensor,
    rows: slice,
    fit: Moments,
    held: Moments,
    perm: torch.Tensor,
    F: Factor,
    alpha: float,
    beta: float,
) -> float | None:
    """Returns the part s of the target shift, 0 to 1, that is best for tokens that it is not fitted to.

    Args:
        W: some rows [rows, in] of a weight, any float dtype.
        rows: which rows these are.
        fit: moments of the tokens that the shift is fitted to; not changed.
        held: moments of the held-out tokens; not changed.
        perm, F: processing order and factor of the Hessian of `fit`.
        alpha, beta: as for `Drift.take_target_shift`.

    Returns:
        None: there is nothing to correct.
    """
    W = W.to(torch.float32)
    Y, held_Y = (part.drift.rows(rows).take_target_shift(W, alpha, beta) for part in (fit, held))
    if Y is None or held_Y is None:
        return None
    D = corrected_target(W, Y, perm, F).to(torch.float32) - W
    confirmed = float((D * held_Y.to(torch.float32)).sum())
    size = float(((D @ held.H.to(torch.float32)) * D).sum())
    if confirmed <= 0 or size <= 0:
        return 0.0
    noise = max(0.0, size / confirmed - 1) * fit.tokens / (fit.tokens + held.tokens)
    return 1 / (1 + noise)


def _row_parts(Y: torch.Tensor, W: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the same rows of both, some at a time, as views."""
    return zip(torch.split(Y, ROWS), torch.split(W, ROWS), strict=True)
