"""Would more calibration text help? Codes from part of it, measured on windows that they have not seen.

While a group's Hessian is summed up, it is solved with what there is after an eighth, a quarter, a half
and all but the last eighth of the batches. Those last ones X, which none of the solutions Q knows, tell

    ‖X (Q - W)ᵀ‖² / ‖X Wᵀ‖²

of each: where that has stopped falling, more windows of the same kind will not help.
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

#: Part of the batches that is held out, and the parts that are solved from.
HELD_OUT, PARTS = 1 / 8, (1 / 8, 1 / 4, 1 / 2)


class LearningCurve:
    """Watches the sums of one group's input; keeps a few rows of solved weights, and no Hessian.

    Args:
        name: the linear that is solved.
        W: its weight [out, in]; some of its rows are solved.
        settings: how; refinements are left out.
        batches: how many will come.
    """

    def __init__(self, name: str, W: torch.Tensor, settings: QuantizeConfig, batches: int) -> None:
        self.name = name
        self._W = W[sample_rows(W)].to(torch.float32)
        damping = 0.01 if settings.damp_percent == "auto" else settings.damp_percent
        self._settings = settings.merged({**QUICK, "damp_percent": damping})
        self._fit = batches - max(1, round(batches * HELD_OUT))
        self._marks = {*(max(1, round(batches * part)) for part in PARTS), self._fit}
        self._solved: list[tuple[int, torch.Tensor]] = []
        self._lost: list[float] = []
        self._whole, self._seen, self._tokens = 0.0, 0, 0

    def add(self, x: torch.Tensor, mask: torch.Tensor | None, hessian: Hessian) -> None:
        """Sees a batch `x` [..., in] that `hessian` has just summed up; mask as there."""
        self._seen += 1
        with timer.phase("watch"):
            if self._seen > self._fit:
                self._measure(unmasked_rows(x, mask).to(torch.float32))
            elif self._seen in self._marks:
                self._solve(hessian)

    def _solve(self, hessian: Hessian) -> None:
        if not self._solved:
            rounded = round_to_nearest(self._W, self._settings)
            self._solved.append((0, rounded.dequantize() - self._W))
        try:
            q = solve(self._W, prepare_hessian(hessian.mean(), self._settings), self._settings)
        except SingularError:  # the solver will meet it too, and says so
            return
        self._solved.append((hessian.tokens, q.dequantize() - self._W))

    def _measure(self, X: torch.Tensor) -> None:
        self._lost = self._lost or [0.0] * len(self._solved)
        for index, (_, E) in enumerate(self._solved):
            self._lost[index] += float((X @ E.T).square().sum())
        self._whole += float((X @ self._W.T).square().sum())
        self._tokens += len(X)

    def record(self) -> LearningCurveRecord | None:
        """The relative error from each number of tokens; None: there was too little text."""
        if len(self._lost) < 3 or not self._whole:
            return None
        errors = [lost / self._whole for lost in self._lost]
        return LearningCurveRecord(
            name=self.name,
            held_out_tokens=self._tokens,
            rtn=errors[0],
            points=[
                CurvePoint(tokens=tokens, relative_error=error)
                for (tokens, _), error in zip(self._solved[1:], errors[1:], strict=True)
            ],
        )


def learning_curve_for(
    blocks: list[Block], index: int, name: str, config: QuantizeConfig, batches: int
) -> LearningCurve | None:
    """In the first, the middle and the last block: who watches a linear's input, of so many batches."""
    count = sum(not block.is_head for block in blocks)
    settings = config.for_module(name)
    if index not in (0, count // 2, count - 1) or settings is None or settings.method != "gptq":
        return None
    return LearningCurve(name, weight_of(blocks[index].linears[name]), settings, batches)
