"""The loop of GPTQ over the columns of one weight, group by group.

With Ĥ = U D Uᵀ (see `core.solver`), column j is rounded to q_j = round(t_j), where

    t_j = T_j + Σ_{i<j} E_i U[i, j],    E_i = T_i - q_i

The sum is the *feedback* of finished columns: the move of column j away from its target T_j that
compensates for the errors made so far. For all columns of a group it is a matrix product with the errors
before the group, computed here. Inside a group, a backend rounds column by column and adds the feedback
of each (`round_panel` in `core/backends/reference.py` shows it in plain torch).
"""

from __future__ import annotations

from itertools import pairwise

import torch

from roundwise.core.act_order import ColumnOrder
from roundwise.core.backends.base import PANEL, ColumnGrids, FactorBlock, SolverBackend
from roundwise.core.grid import Grid, GridSpec
from roundwise.core.linalg import Factor, add_matmul, matmul
from roundwise.core.quantized_weight import QuantizedWeight

#: Columns whose feedback from all columns before them is one matrix product.
LOOK_BACK = 512


class ColumnSweep:
    """One pass over the columns of a weight; all state is [columns, rows], in processing order.

    Args:
        Tt: target [in, rows], columns in processing order: each is one contiguous row.
        F: factor of Ĥ.
        order: the processing order.
        spec: rules of the grids.
        grids: known grids, scale and zero each [rows, groups]; None: found group by group.
        backend: rounds groups of columns.
    """

    def __init__(
        self,
        Tt: torch.Tensor,
        F: Factor,
        order: ColumnOrder,
        spec: GridSpec,
        grids: Grid | None,
        backend: SolverBackend,
    ) -> None:
        self.Tt, self.F, self.order, self.spec, self.backend = Tt, F, order, spec, backend
        self.E = torch.empty_like(Tt)
        self.codes = torch.empty_like(Tt, dtype=torch.uint8)
        self.loss = 0.0
        """Σ_j D_j (t_j - q_j)² over all rows and columns rounded so far: tr((T - Q) Ĥ (T - Q)ᵀ)."""
        self.has_grids = grids is not None
        if grids is None:
            shape = (order.groups, Tt.shape[1])
            self.grids = Grid(Tt.new_empty(shape), Tt.new_empty(shape))
        else:
            self.grids = Grid(*(part.to(Tt.dtype).T.contiguous() for part in grids))
        # Columns begin … end - 1 have their feedback from all columns before begin.
        self._begin, self._end, self._early_feedback = 0, 0, Tt[:0]

    def round_all(self) -> None:
        """Rounds every column in order, one run of columns after another."""
        U, D, group = self.F.U, self.F.D, self.order.group
        for a, b in self._runs():
            block, T = FactorBlock(U[a:b, a:b], D[a:b]), self.Tt[a:b]
            feedback = self._feedback(a, b)
            if self.has_grids:
                grids = ColumnGrids(self.grids, group[a:b], self.spec.maxq)
                rounded = self.backend.round_known(block, T, feedback, grids)
            else:
                grid, rounded = self.backend.round_group(block, T, feedback, self.spec)
                self.grids.scale[group[a]], self.grids.zero[group[a]] = grid
            self.codes[a:b], self.E[a:b] = rounded.codes, rounded.E
            self.loss += float(rounded.loss.sum())

    def _runs(self) -> list[tuple[int, int]]:
        """Returns first and last + 1 of the columns that are rounded together, in order.

        The columns of a run share a grid. If all grids are known, runs are panels of `PANEL` columns.
        """
        width, group = len(self.Tt), self.order.group
        if self.has_grids:
            return list(pairwise([*range(0, width, PANEL), width]))
        # Read off the order, not counted: a group that is shorter than others need not come last.
        starts = ((group[1:] != group[:-1]).nonzero().flatten() + 1).tolist()
        return list(pairwise([0, *starts, width]))

    def _feedback(self, a: int, b: int) -> torch.Tensor:
        """Returns the feedback Σ_{i<a} E_i U[i, a:b] of all finished columns, [b - a, rows].

        Runs can be narrow, and one wide product is faster than many narrow ones. So the feedback of
        all columns before a run is computed for `LOOK_BACK` columns at once, and each later run of
        these adds the columns that were finished since.
        """
        U, E = self.F.U, self.E
        if b > self._end:
            self._begin, self._end = a, max(b, min(a + LOOK_BACK, len(U)))
            self._early_feedback = matmul(U[:a, a : self._end].T, E[:a])
        begin = self._begin
        feedback = self._early_feedback[a - begin : b - begin]
        if a > begin:
            add_matmul(feedback, U[begin:a, a:b].T, E[begin:a])
        return feedback

    def result(self) -> QuantizedWeight:
        """Returns the weight as [rows, in], in the original channel order; no errors are measured."""
        codes = torch.empty_like(self.codes)
        codes[self.order.perm] = self.codes
        return QuantizedWeight(
            codes=codes.T.contiguous(),
            scales=self.grids.scale.T.contiguous().to(torch.float16),
            zeros=self.grids.zero.T.contiguous().to(torch.int32),
            g_idx=self.order.g_idx,
            bits=self.spec.bits,
            damp_percent=self.F.damp_percent,
            damp_tried=self.F.tried,
        )
