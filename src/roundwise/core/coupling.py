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

import torch

from roundwise.core.factor import factor

#: Damping of B, as a part of its mean diagonal: a few thousand gradients leave directions unseen.
DAMP = 0.1
#: Parts that coupled rows are taken in, and the fewest rows of one.
PARTS, FEWEST = 16, 8


class Coupling:
    """The rows of one weight on their way through the solver, part by part.

    Args:
        B: [out, out], symmetric; see above.
        columns: of the weight.

    Raises:
        SingularError: B is zero.
        NumericalError: NaN or infinity in B.
    """

    def __init__(self, B: torch.Tensor, columns: int) -> None:
        # As columns with act-order: first those whose errors cost most, while all others can answer.
        self.perm = torch.argsort(B.diagonal(), descending=True, stable=True)
        self.V = factor(B, self.perm, DAMP).U
        self.E = self.V.new_zeros(len(B), columns)
        self._rows = slice(0, 0)

    def parts(self, most: int) -> Iterator[torch.Tensor]:
        """Rows of one part after the other, at most so many: int64 indices."""
        step = min(most, max(FEWEST, -(-len(self.perm) // PARTS)))
        for rows in row_parts(len(self.perm), step):
            self._rows = rows
            yield self.perm[rows]

    def asked(self) -> torch.Tensor:
        """How the present rows are to answer to the errors of earlier ones, [rows, in]."""
        rows, start = self._rows, self._rows.start
        asked = self.V[:start, rows].T @ self.E[:start]
        answer = torch.linalg.solve_triangular(
            self.V[rows, rows].T, asked, upper=False, unitriangular=True
        )
        assert isinstance(answer, torch.Tensor)
        return answer

    def done(self, E: torch.Tensor) -> None:
        """Takes the errors T - Q of the present rows [rows, in], T being what they aim at themselves."""
        self.E[self._rows] = E

    def in_order(self, part: torch.Tensor) -> torch.Tensor:
        """Rows of all parts [out, …], back in the weight's own order."""
        ordered = torch.empty_like(part)
        ordered[self.perm] = part
        return ordered


def row_parts(count: int, step: int) -> Iterator[slice]:
    """`count` rows, `step` at a time."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
