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
and costs on other text. So a part of the tokens is held out, and says with which ridge λ it is to be
fitted, D = Y (H + λ)⁻¹, and how far it is to be trusted: on tokens that D is not fitted to, the loss of
a part s of it is

    ||s X Dᵀ - Z||² / n = s² tr(D H Dᵀ) - 2 s tr(D Yᵀ) + const

with the moments H and Y of those tokens; it is least at s = tr(D Yᵀ) / tr(D H Dᵀ), cut to 0 … 1. That is
e / (e + v) for a true effect e and noise v, and v falls as 1/n. The shift that is used in the end is
fitted to all tokens, m instead of n: its best part is e / (e + v n/m) = 1 / (1 + (1/s - 1) n/m).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from roundwise.core.linalg import Factor, add_matmul, factor, permuted_columns

#: Rows of a weight converted at a time.
ROWS = 512
#: Ridges λ of the regression, in parts of mean(diag H), that held-out tokens choose from.
RIDGES = (0.01, 0.1, 1.0)


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

    def shrink(self, F: Factor, by: float) -> None:
        """Turns the moments Y into those whose correction Y (H + μ)⁻¹ is Y (H + λ)⁻¹, in place.

        That is Y (H + λ)⁻¹ (H + μ) = Y - (λ - μ) Y (H + λ)⁻¹.

        Args:
            F: factor of H + λ, columns in natural order.
            by: λ - μ.
        """
        for moment in (self.input, self.residual):
            for rows in torch.split(moment, ROWS) if moment is not None else ():
                # A copy: the transpose of a single row is contiguous, and `solve` works in place.
                rows.sub_(F.solve(rows.T.clone(memory_format=torch.contiguous_format)).T, alpha=by)

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


@dataclass(frozen=True)
class SampledRows:
    """Rows of a weight that stand for all when its correction is judged, and its strengths."""

    W: torch.Tensor
    """[rows, in], any float dtype."""
    rows: slice
    """Which rows of the weight these are."""
    alpha: float
    beta: float


def confirm(
    weights: Mapping[str, SampledRows], fit: Moments, held: Moments
) -> tuple[float, dict[str, float]]:
    """Returns the ridge, and the part s of each weight's correction, that are best on other tokens.

    Args:
        weights: name -> rows of a weight; all read the same input.
        fit: moments of the tokens that the correction is fitted to; not changed.
        held: moments of the held-out tokens; not changed.

    Returns:
        One of `RIDGES`; name -> s, 0 to 1, for the weights that have something to correct.

    Raises:
        SingularError: H of `fit` is zero, or no damping makes it definite.
    """
    lost = {name: _LostOutput.of(sample, fit, held) for name, sample in weights.items()}
    corrected = {name: each for name, each in lost.items() if each is not None}
    best_gain, best = -1.0, (RIDGES[0], dict[str, float]())
    for ridge in RIDGES if corrected else ():
        F = factor(fit.H, torch.arange(len(fit.H), device=fit.H.device), ridge)
        found = {name: each.confirmed(F, fit, held) for name, each in corrected.items()}
        gain = sum(each[0] for each in found.values())
        if gain > best_gain:
            best_gain, best = gain, (ridge, {name: part for name, (_, part) in found.items()})
    return best


@dataclass(frozen=True)
class _LostOutput:
    """Target shifts Y of some rows of a weight, which no ridge changes, and their output's energy."""

    fit: torch.Tensor
    held: torch.Tensor
    energy: float
    """tr(W H Wᵀ) on the held-out tokens."""

    @staticmethod
    def of(sample: SampledRows, fit: Moments, held: Moments) -> _LostOutput | None:
        """Returns them for rows of a weight; None: there is nothing to correct."""
        W = sample.W.to(torch.float32)
        Y, held_Y = (
            part.drift.rows(sample.rows).take_target_shift(W, sample.alpha, sample.beta)
            for part in (fit, held)
        )
        if Y is None or held_Y is None:
            return None
        energy = float(((W @ held.H.to(torch.float32)) * W).sum()) or 1.0
        return _LostOutput(Y.to(torch.float32), held_Y, energy)

    def confirmed(self, F: Factor, fit: Moments, held: Moments) -> tuple[float, float]:
        """Returns the loss that a correction takes away, as a part of the energy, and its part s."""
        D = F.solve(self.fit.T.clone(memory_format=torch.contiguous_format)).T
        confirmed = float((D * self.held).sum())
        size = float(((D @ held.H.to(torch.float32)) * D).sum())
        if confirmed <= 0 or size <= 0:
            return 0.0, 0.0
        part = min(1.0, confirmed / size)
        noise = (1 / part - 1) * fit.tokens / (fit.tokens + held.tokens)
        return (2 * part * confirmed - part**2 * size) / self.energy, 1 / (1 + noise)


def _row_parts(Y: torch.Tensor, W: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the same rows of both, some at a time, as views."""
    return zip(torch.split(Y, ROWS), torch.split(W, ROWS), strict=True)
