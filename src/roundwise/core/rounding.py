"""One weight on its way through the columns: which are rounded next, and what is asked of them."""

from __future__ import annotations

from itertools import pairwise

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.act_order import ColumnOrder
from roundwise.core.backends.reference import PANEL, round_group, round_known
from roundwise.core.grid import Grid
from roundwise.core.linalg import Factor, add_matmul, matmul
from roundwise.core.quantized_weight import QuantizedWeight

#: Columns whose products with all those before them are one product.
LOOK_BACK = 512


class ColumnSweep:
    """The recursion's state, transposed so that a column of T is one contiguous row.

    Args:
        Tt: target [in, rows], columns in processing order.
        F: factor of Ĥ.
        order: the processing order.
        config: settings.
        grids: known grids, each [rows, groups]; None: found group by group.
    """

    def __init__(
        self,
        Tt: torch.Tensor,
        F: Factor,
        order: ColumnOrder,
        config: QuantizeConfig,
        grids: Grid | None,
    ) -> None:
        self.Tt, self.F, self.order, self.config = Tt, F, order, config
        self.E = torch.empty_like(Tt)
        self.codes = torch.empty_like(Tt, dtype=torch.uint8)
        self.loss = 0.0
        self.known = grids is not None
        if grids is None:
            shape = (config.groups(len(Tt)), Tt.shape[1])
            self.grids = Grid(Tt.new_empty(shape), Tt.new_empty(shape))
        else:
            self.grids = Grid(*(part.to(Tt.dtype).T.contiguous() for part in grids))

    def round_all(self) -> None:
        """Rounds every column in order, one segment after another; adds up the loss.

        It is Σ_j D_j (t_j - q_j)² over all rows and columns: tr((T - Q) Ĥ (T - Q)ᵀ).
        """
        U, D, config = self.F.U, self.F.D, self.config
        end = 0
        for a, b in self._segments():
            # What finished columns ask of this segment: one product for several segments, with all
            # columns before them, and one with those between.
            if b > end:
                begin, end = a, max(b, min(a + LOOK_BACK, len(U)))
                before = matmul(U[:begin, begin:end].T, self.E[:begin])
            feedback = before[a - begin : b - begin]
            if a > begin:
                add_matmul(feedback, U[begin:a, a:b].T, self.E[begin:a])
            target, block = self.Tt[a:b], U[a:b, a:b]
            if self.known:
                index = self.order.group[a:b]
                codes, E, loss = round_known(
                    block, D[a:b], target, feedback, self.grids, index, config.maxq
                )
            else:
                grid, codes, E, loss = round_group(
                    block, D[a:b], target, feedback, weights=self._weights(a, b),
                    keep=1 if config.grid == "minmax" else config.grid_candidates,
                    maxq=config.maxq, min_zero=config.min_zero, sym=config.sym,
                    flip_sign=not config.positive_scales,
                )  # fmt: skip
                group = self.order.group[a]
                self.grids.scale[group], self.grids.zero[group] = grid
            self.codes[a:b], self.E[a:b] = codes, E
            self.loss += float(loss.sum())

    def _weights(self, a: int, b: int) -> torch.Tensor | None:
        """What a squared error in each column counts while grids are compared."""
        if self.config.grid == "minmax":
            return None
        D = self.F.D[a:b]
        return D if self.config.grid == "pivot" else torch.ones_like(D)

    def _segments(self) -> list[tuple[int, int]]:
        """Runs of columns that share a grid; panels when all grids are known beforehand."""
        width, groups = len(self.Tt), self.order.group
        if self.known:
            return list(pairwise([*range(0, width, PANEL), width]))
        # Found from the groups, not by counting: a shorter one need not be processed last.
        cuts = ((groups[1:] != groups[:-1]).nonzero().flatten() + 1).tolist()
        return list(pairwise([0, *cuts, width]))

    def result(self) -> QuantizedWeight:
        """Back to [rows, in] and the original channel order."""
        codes = torch.empty_like(self.codes)
        codes[self.order.perm] = self.codes
        return QuantizedWeight(
            codes=codes.T.contiguous(),
            scales=self.grids.scale.T.contiguous().to(torch.float16),
            zeros=self.grids.zero.T.contiguous().to(torch.int32),
            g_idx=self.order.g_idx(),
            bits=self.config.bits,
            damp_percent=self.F.damp_percent,
            damp_tried=self.F.tried,
        )
