"""Protocol of a solver backend: the loops over columns, which are all that differs between devices.

All matrices here are [columns, rows of the weight], so that one column of the weight is contiguous. Rows
are independent given the Hessian. The letters are those of `core.solver`: target T, updated target t,
codes' values Q, error E = T - Q, and Ĥ = U D Uᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch

from roundwise.core.grid import Grid, GridSpec

#: Columns that are processed one after another between two matrix products.
PANEL = 128
#: Columns of an exchange: those that may compensate for a move.
WINDOW = 1024


class FactorBlock(NamedTuple):
    """The part of Ĥ = U D Uᵀ that belongs to n consecutive columns."""

    U: torch.Tensor
    """[n, n], unit upper triangular."""
    D: torch.Tensor
    """[n], the pivots: D_j (t_j - q_j)² is the loss of rounding t_j to q_j."""


@dataclass(frozen=True)
class ColumnGrids:
    """Known grids of n columns: column j uses the grids of group `index[j]`."""

    groups: Grid
    """Scale and zero, each [groups, rows]."""
    index: torch.Tensor
    """int64 [n]."""
    maxq: int
    """Largest code."""

    def of_columns(self) -> Grid:
        """Returns scale and zero of each column, both [n, rows]."""
        return Grid(self.groups.scale[self.index], self.groups.zero[self.index])


@dataclass(frozen=True)
class CodePanel:
    """n consecutive columns whose codes are improved, all other columns fixed."""

    H: torch.Tensor
    """[n, n], the panel's block of Ĥ."""
    grids: ColumnGrids
    """Grids of these columns."""


class Rounded(NamedTuple):
    """n rounded columns."""

    codes: torch.Tensor
    """uint8 [n, rows]."""
    E: torch.Tensor
    """[n, rows], errors T - Q."""
    loss: torch.Tensor
    """[rows], Σ_j D_j (t_j - q_j)²."""


class SolverBackend(Protocol):
    """The solver's loops over columns on one kind of device; stateless."""

    #: What tests and messages call it.
    name: ClassVar[str]

    def search_grids(self, W: torch.Tensor, weights: torch.Tensor, spec: GridSpec) -> Grid:
        """Searches the best grids of one group (`core.grid_search.best_grids`).

        Args:
            W: [n, rows], the group's weights.
            weights: [n], of squared errors.
            spec: rules of the grids.

        Returns:
            Scale and zero, each [spec.keep, rows], the best first.

        Raises:
            NumericalError: a scale does not fit float16.
        """
        ...

    def round_group(
        self, block: FactorBlock, T: torch.Tensor, feedback: torch.Tensor, spec: GridSpec
    ) -> tuple[Grid, Rounded]:
        """Finds the grid of one group and rounds its columns, one after another.

        Args:
            block: the group's block of the factor.
            T: [n, rows], target of the group.
            feedback: [n, rows], t - T as far as columns before the group add to it.
            spec: rules of the grid, and how it is searched.

        Returns:
            The grid of each row, and the rounded columns.

        Raises:
            NumericalError: a scale does not fit float16.
        """
        ...

    def round_known(
        self, block: FactorBlock, T: torch.Tensor, feedback: torch.Tensor, grids: ColumnGrids
    ) -> Rounded:
        """Rounds columns whose grids are known, one after another.

        Args:
            block, T, feedback: as for `round_group`.
            grids: the grids of these columns.
        """
        ...

    def descend(self, panel: CodePanel, G: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Coordinate descent: moves each code of a panel to its best value, all others fixed.

        Args:
            panel: block of Ĥ, and grids.
            G: [n, rows], the gradient (Q - T) Ĥ of these columns before any of them moves.
            codes: uint8 [n, rows], improved in place.

        Returns:
            By how much each value of Q moved, [n, rows].
        """
        ...

    def exchange(
        self, panel: CodePanel, G: torch.Tensor, codes: torch.Tensor, moves: int
    ) -> torch.Tensor:
        """Lets several codes of a row move together, where no single move lowers the loss.

        First each column in turn goes to its best code, all others fixed. Then each column moves to its
        next best code; up to `moves` - 1 times the column that gains most makes its best move;
        and the whole chain is undone unless it lowers the loss.

        Args:
            panel, G, codes: as for `descend`.
            moves: largest number of codes of a row that move together.

        Returns:
            By how much each value of Q moved, [n, rows].
        """
        ...
