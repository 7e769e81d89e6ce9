"""Outputs that are not alike: an error's cost depends on which outputs it is in, and in which together.

With g [tokens, out] the gradients of the model's log-likelihood with respect to a layer's output, the
model loses about tr(B E Ĥ Eᵀ) by the errors E = T - Q of the layer, B = gᵀg / n (curvature as a
Kronecker product: K-FAC, arXiv 1503.05671; for rounding, YAQA, arXiv 2505.22988). Plain GPTQ takes the
identity for B. With B = V D Vᵀ, V unit upper triangular in an order of the rows,

    tr(B E Ĥ Eᵀ) = Σ_n D_n e'_n Ĥ e'_nᵀ,    e'_n = e_n + Σ_{m<n} V[m, n] e_m

which is the solver's own form once more, across rows instead of columns: row n is an ordinary problem
whose target makes up for the errors of the rows before it. Rows are taken in parts, which aim at the
best answer to all before them while all later ones are free: V_bb⁻ᵀ times what is asked of part b, as
for a group's grid. The rows of one part do not see each other's errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from roundwise.core.linalg import factor, matmul, solve_triangular

#: Damping of B, as a part of its mean diagonal: a few thousand gradients leave directions unseen.
DAMP = 0.1
#: Parts that coupled rows are taken in, and the fewest rows of one; many are whole vectors.
PARTS, FEWEST, VECTORS = 12, 8, 32


class ProcessGroup(Protocol):
    """Processes that solve the rows of each part together: each a share of them (`pipeline.ranks`)."""

    def row_range(self, total: int) -> slice:
        """This process's share of so many rows."""

    def all_gather_rows(self, part: torch.Tensor, total: int) -> torch.Tensor:
        """All of a tensor [total, ...] of which each process has its `rows`."""

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Adds up tensors of one shape over all processes, in place."""


class OutputWeighting:
    """The rows of one weight on their way through the solver, part by part.

    Args:
        B: [out, out], symmetric; see above.
        columns: of the weight.
        helpers: with whom the rows of each part are shared; None: they are all ours.

    Raises:
        SingularError: B is zero.
        NumericalError: NaN or infinity in B.
    """

    def __init__(
        self, B: torch.Tensor, columns: int, process_group: ProcessGroup | None = None
    ) -> None:
        # As columns with act-order: first those whose errors cost most, while all others can answer.
        self.perm = torch.argsort(B.diagonal(), descending=True, stable=True)
        self.V = factor(B, self.perm, DAMP).U
        self.E = self.V.new_zeros(len(B), columns)
        self.process_group, self.idle = process_group, False
        """idle: the one row that `row_blocks` gave is solved for nobody, helpers have all of the part."""
        self._rows, self._mine = slice(0, 0), slice(0, 0)
        self._totals: list[int] = []
        self._counts: list[int] = []

    def row_blocks(self, most: int) -> Iterator[torch.Tensor]:
        """Our rows of one part after the other, at most so many: int64 indices."""
        step = max(FEWEST, -(-len(self.perm) // PARTS))
        if step > VECTORS:
            step = -(-step // VECTORS) * VECTORS
        step = min(most, step)
        for rows in row_parts(len(self.perm), step):
            total = rows.stop - rows.start
            mine = slice(0, total) if self.process_group is None else self.process_group.row_range(total)
            self.idle = mine.start == mine.stop
            self._rows, self._mine = rows, slice(0, 1) if self.idle else mine
            self._totals.append(total)
            self._counts.append(0 if self.idle else mine.stop - mine.start)
            yield self.perm[rows][self._mine]

    def feedback(self) -> torch.Tensor:
        """How our present rows are to answer to the errors of earlier ones, [rows, in]."""
        rows, start = self._rows, self._rows.start
        # The transpose: a narrow matrix from the right costs less.
        feedback = matmul(self.E[:start].T, self.V[:start, rows]).T.contiguous()
        return solve_triangular(self.V[rows, rows].T, feedback, upper=False)[self._mine]

    def record_errors(self, E: torch.Tensor) -> None:
        """Takes the errors T - Q of our present rows [rows, in], T being what they aim at themselves."""
        if self.process_group is not None:
            E = self.process_group.all_gather_rows(E[: self._counts[-1]], self._totals[-1])
        self.E[self._rows] = E

    def in_order(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Our rows [rows, …] of every part, as all rows in the weight's own order."""
        if self.process_group is not None:
            parts = [
                self.process_group.all_gather_rows(part[:count], total)
                for part, count, total in zip(parts, self._counts, self._totals, strict=True)
            ]
        whole = torch.cat(parts)
        ordered = torch.empty_like(whole)
        ordered[self.perm] = whole
        return ordered


def row_parts(count: int, step: int) -> Iterator[slice]:
    """`count` rows, `step` at a time."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
