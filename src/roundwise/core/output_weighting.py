"""Kronecker weighting of outputs: errors in different outputs of a layer cost differently (YAQA).

With g [tokens, out] the gradients of the model's log-likelihood with respect to a layer's output, the
errors E = T - Q of the layer cost the model about tr(B E Ĥ Eᵀ), B = gᵀg / n (curvature as a Kronecker
product: K-FAC, arXiv 1503.05671; for rounding, YAQA, arXiv 2505.22988). Plain GPTQ takes the identity
for B. With B = V D Vᵀ, V unit upper triangular in an order of the rows,

    tr(B E Ĥ Eᵀ) = Σ_n D_n e'_n Ĥ e'_nᵀ,    e'_n = e_n + Σ_{m<n} V[m, n] e_m

which is the form of the solver's loss, across rows instead of columns: row n is an ordinary problem
whose target compensates for the errors of the rows before it. Their sum Σ_m V[m, n] e_m is the
*feedback* of finished rows, as `core.rounding` has it for columns. Rows are solved in parts. Part b gets
the target that is best while all later rows can still change: the feedback times V_bb⁻ᵀ, as for the grid
of a group of columns. The rows of one part do not see each other's errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from roundwise.core.linalg import factor, matmul, solve_triangular

#: Damping of B, as a part of its mean diagonal: a few thousand gradients do not show all directions.
DAMP = 0.1
#: Number of parts that rows are solved in, and the fewest rows of a part. Parts of more than
#: `VECTOR_ROWS` rows have a multiple of it: whole vectors of the processor.
PARTS, MIN_ROWS, VECTOR_ROWS = 12, 8, 32


class ProcessGroup(Protocol):
    """Processes that share the rows of each part, such as `system.distributed.Ranks`."""

    def row_range(self, total: int) -> slice:
        """Returns this process's rows of `total`."""

    def all_gather_rows(self, part: torch.Tensor, total: int) -> torch.Tensor:
        """Returns the whole tensor [total, ...] of which each process has its `row_range`."""

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums up a tensor over all processes, in place."""


class OutputWeighting:
    """Feedback between the rows of one weight while they are solved, part by part.

    For each part that `row_blocks` yields, `feedback` is added to the target, and `record_errors` takes
    the errors that are left.

    Args:
        B: [out, out], symmetric; see above.
        columns: number of columns of the weight.
        process_group: processes that share the rows of each part; None: this one has all rows.

    Raises:
        SingularError: B is zero.
        NumericalError: NaN or infinity in B.
    """

    def __init__(
        self, B: torch.Tensor, columns: int, process_group: ProcessGroup | None = None
    ) -> None:
        # As act-order does for columns: rows whose errors cost most go first, while all others can still
        # compensate.
        self.perm = torch.argsort(B.diagonal(), descending=True, stable=True)
        self.V = factor(B, self.perm, DAMP).U
        self.E = self.V.new_zeros(len(B), columns)
        self.process_group, self.idle = process_group, False
        """idle: this process has no rows in the current part; it solves one dummy row so that
        collectives line up."""
        # Rows of the current part, and this process's among them.
        self._part, self._own = slice(0, 0), slice(0, 0)
        # Rows of each part so far, and how many of them this process solved.
        self._totals: list[int] = []
        self._counts: list[int] = []

    def row_blocks(self, max_rows: int) -> Iterator[torch.Tensor]:
        """Yields this process's rows of one part after another, at most `max_rows`: int64 indices."""
        step = max(MIN_ROWS, -(-len(self.perm) // PARTS))
        if step > VECTOR_ROWS:
            step = -(-step // VECTOR_ROWS) * VECTOR_ROWS
        step = min(max_rows, step)
        for part in row_parts(len(self.perm), step):
            total = part.stop - part.start
            own = (
                slice(0, total)
                if self.process_group is None
                else self.process_group.row_range(total)
            )
            self.idle = own.start == own.stop
            self._part, self._own = part, slice(0, 1) if self.idle else own
            self._totals.append(total)
            self._counts.append(0 if self.idle else own.stop - own.start)
            yield self.perm[part][self._own]

    def feedback(self) -> torch.Tensor:
        """Returns the feedback of finished rows for this process's current rows, [rows, in]."""
        part, start = self._part, self._part.start
        # The transpose: a narrow matrix from the right costs less.
        feedback = matmul(self.E[:start].T, self.V[:start, part]).T.contiguous()
        return solve_triangular(self.V[part, part].T, feedback, upper=False)[self._own]

    def record_errors(self, E: torch.Tensor) -> None:
        """Records the errors T - Q of this process's current rows [rows, in], T without feedback."""
        if self.process_group is not None:
            E = self.process_group.all_gather_rows(E[: self._counts[-1]], self._totals[-1])
        self.E[self._part] = E

    def in_order(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Joins all processes' rows [rows, …] of each part, in the order of the weight's rows."""
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
    """Yields slices of `count` rows, `step` rows at a time."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
