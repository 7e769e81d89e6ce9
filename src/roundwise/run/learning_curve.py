"""Learning curve: a layer's error as a function of calibration tokens; tells if more text would help.

While a group's Hessian is summed, one of its linears is solved after an eighth, a quarter, a half and
seven eighths of the batches. The remaining batches X, which none of the solutions Q has seen, give

    ‖X (Q - W)ᵀ‖² / ‖X Wᵀ‖²

of each. If it no longer falls, more windows of the same kind will not help.
"""

from __future__ import annotations

import torch

from roundwise.checkpoint.manifest import CurvePoint, LearningCurveRecord
from roundwise.config import QuantizeConfig
from roundwise.core.held_out_damping import QUICK
from roundwise.core.hessian import Hessian, unmasked_rows
from roundwise.core.solver import prepare_hessian, round_to_nearest, sample_rows, solve
from roundwise.errors import SingularError
from roundwise.model.blocks import Block, weight_of
from roundwise.system.timer import timer

#: Fraction of the batches that is held out, and the fractions after which the linear is solved.
HELD_OUT, PARTS = 1 / 8, (1 / 8, 1 / 4, 1 / 2)


class LearningCurve:
    """Observer of a group's input; keeps the errors of a few rows of solved weights, but no Hessian.

    Args:
        name: the linear to solve.
        W: its weight [out, in]; some rows are solved.
        settings: its settings; refinement is skipped.
        batches: number of batches that will be added.
    """

    def __init__(self, name: str, W: torch.Tensor, settings: QuantizeConfig, batches: int) -> None:
        self.name = name
        self._W = W[sample_rows(W)].to(torch.float32)
        damping = 0.01 if settings.damp_percent == "auto" else settings.damp_percent
        self._settings = settings.merged({**QUICK, "damp_percent": damping})
        self._fit_batches = batches - max(1, round(batches * HELD_OUT))
        self._solve_after = {*(max(1, round(batches * part)) for part in PARTS), self._fit_batches}
        self._weight_errors: list[tuple[int, torch.Tensor]] = []
        """(tokens, Q - W) of each solution; first, with 0 tokens, rounding to nearest."""
        self._losses: list[float] = []
        """‖X (Q - W)ᵀ‖² of each solution."""
        self._energy, self._batches, self._held_out_tokens = 0.0, 0, 0

    def add(self, x: torch.Tensor, mask: torch.Tensor | None, hessian: Hessian) -> None:
        """Solves with the tokens so far, or measures the errors on a held-out batch.

        Args:
            x: batch of inputs [..., in] that was just added to `hessian`.
            mask: bool, False for tokens that do not count; None: all count.
            hessian: the sum.
        """
        self._batches += 1
        with timer.phase("watch"):
            if self._batches > self._fit_batches:
                self._measure(unmasked_rows(x, mask).to(torch.float32))
            elif self._batches in self._solve_after:
                self._solve(hessian)

    def _solve(self, hessian: Hessian) -> None:
        if not self._weight_errors:
            rounded = round_to_nearest(self._W, self._settings)
            self._weight_errors.append((0, rounded.dequantize() - self._W))
        try:
            q = solve(self._W, prepare_hessian(hessian.mean(), self._settings), self._settings)
        except SingularError:  # the solver of the run will fail too, and report it
            return
        self._weight_errors.append((hessian.tokens, q.dequantize() - self._W))

    def _measure(self, X: torch.Tensor) -> None:
        self._losses = self._losses or [0.0] * len(self._weight_errors)
        for index, (_, E) in enumerate(self._weight_errors):
            self._losses[index] += float((X @ E.T).square().sum())
        self._energy += float((X @ self._W.T).square().sum())
        self._held_out_tokens += len(X)

    def record(self) -> LearningCurveRecord | None:
        """Returns the relative error for each number of tokens; None: there was too little text."""
        if len(self._losses) < 3 or not self._energy:
            return None
        errors = [loss / self._energy for loss in self._losses]
        return LearningCurveRecord(
            name=self.name,
            held_out_tokens=self._held_out_tokens,
            rtn=errors[0],
            points=[
                CurvePoint(tokens=tokens, relative_error=error)
                for (tokens, _), error in zip(self._weight_errors[1:], errors[1:], strict=True)
            ],
        )


def learning_curve_for(
    blocks: list[Block], index: int, name: str, config: QuantizeConfig, batches: int
) -> LearningCurve | None:
    """Returns an observer of a linear's input, in the first, the middle and the last block; else None.

    Args:
        blocks: all blocks of the model.
        index: number of the block.
        name: the linear.
        config: settings; only layers quantized by GPTQ are observed.
        batches: number of batches that will be added to the linear's Hessian.
    """
    count = sum(not block.is_head for block in blocks)
    settings = config.for_module(name)
    if index not in (0, count // 2, count - 1) or settings is None or settings.method != "gptq":
        return None
    return LearningCurve(name, weight_of(blocks[index].linears[name]), settings, batches)
