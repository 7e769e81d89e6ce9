"""The solver backend that needs nothing but torch: any device, float32 and float64.

Reads as the algorithm is written: `round_group` finds a group's grid, `_round_columns` is the loop of
GPTQ in its LDL form (see `core.solver`), `descend` and `exchange` improve codes afterwards. The other
backends compute the same, faster.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from roundwise.core.backends.base import PANEL, CodePanel, ColumnGrids, FactorBlock, Rounded
from roundwise.core.grid import Grid, GridSpec, decode, encode, minmax
from roundwise.core.grid_search import best_grids, score_grids

#: Smallest distance of a weight from its best value, in steps, at which an exchange begins with it:
#: nearer ones cost more to move than other columns can gain.
MIN_DISTANCE = 0.25
#: Smallest gain of an exchange, as a part of what one step of its first column costs.
MIN_GAIN = 1e-4
#: Entries of the largest temporary while grids are compared, on the CPU and on accelerators; rows are
#: taken in parts to keep to it.
WORKSPACE, ACCELERATOR_WORKSPACE = 1 << 21, 1 << 24


class TorchBackend:
    """Plain torch. Subclasses replace `score_grids`, `round_panel`, `descend` and `exchange`."""

    name: ClassVar[str] = "torch"

    def score_grids(self, W: torch.Tensor, D: torch.Tensor, grids: Grid, maxq: int) -> torch.Tensor:
        """Returns what rounding W to each candidate costs; see `core.grid_search.score_grids`."""
        return score_grids(W, D, grids, maxq)

    def search_grids(self, W: torch.Tensor, weights: torch.Tensor, spec: GridSpec) -> Grid:
        """Searches the best grids of one group; see `SolverBackend`."""
        return best_grids(W, weights, spec, self.score_grids)

    def round_group(
        self, block: FactorBlock, T: torch.Tensor, feedback: torch.Tensor, spec: GridSpec
    ) -> tuple[Grid, Rounded]:
        """Finds the grid of one group and rounds its columns; see `SolverBackend`.

        The grid must fit the group's weights as updated by all finished columns, with the group's own
        later columns free to move: W_g = T_g + (t_g - T_g) U_gg⁻¹, a unit-triangular solve.
        """
        weights = spec.error_weights(block.D)
        entries = WORKSPACE if T.device.type == "cpu" else ACCELERATOR_WORKSPACE
        step = max(1, entries // (len(T) * spec.keep))
        parts: list[tuple[torch.Tensor, ...]] = []
        by_rows = (torch.split(each, step, dim=1) for each in (T, feedback))
        for T_part, feedback_part in zip(*by_rows, strict=True):
            W_part = torch.linalg.solve_triangular(
                block.U.T, feedback_part, upper=False, unitriangular=True
            ).add_(T_part)
            if weights is None:
                grid = minmax(W_part.T, spec)
                rounded = self._round_columns(block, T_part, feedback_part, grid, spec.maxq)
            else:
                grids = self.search_grids(W_part, weights, spec)
                grid, rounded = self._round_with_best(
                    block, T_part, feedback_part, grids, spec.maxq
                )
            parts.append((*grid, *rounded))
        scale, zero, codes, E, loss = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
        return Grid(scale, zero), Rounded(codes, E, loss)

    def round_known(
        self, block: FactorBlock, T: torch.Tensor, feedback: torch.Tensor, grids: ColumnGrids
    ) -> Rounded:
        """Rounds columns whose grids are known; see `SolverBackend`."""
        return self._round_columns(block, T, feedback, grids.of_columns(), grids.maxq)

    def _round_with_best(
        self, block: FactorBlock, T: torch.Tensor, feedback: torch.Tensor, grids: Grid, maxq: int
    ) -> tuple[Grid, Rounded]:
        """Rounds with each of the grids [candidates, rows]; keeps each row's grid of least loss."""
        count, rows = grids.scale.shape
        # All candidates in one pass, as if each row of the weight were there `count` times.
        grid = Grid(grids.scale.reshape(-1), grids.zero.reshape(-1))
        codes, E, loss = self._round_columns(
            block, T.repeat(1, count), feedback.repeat(1, count), grid, maxq
        )
        best = loss.view(count, rows).argmin(dim=0)
        pick = best * rows + torch.arange(rows, device=best.device)
        rounded = Rounded(codes[:, pick], E[:, pick], loss[pick])
        return Grid(grid.scale[pick], grid.zero[pick]), rounded

    def _round_columns(
        self, block: FactorBlock, T: torch.Tensor, feedback: torch.Tensor, grid: Grid, maxq: int
    ) -> Rounded:
        """GPTQ's loop over columns: q_j = round(t_j), t_j = T_j + feedback_j + Σ_{i<j} E_i U[i, j].

        The sum is one matrix product for the panels before the column's own; inside a panel columns
        follow one another.

        Args:
            block: n columns of the factor.
            T, feedback: [n, rows].
            grid: of each row, [rows], or of each column and row, [n, rows].
            maxq: largest code.
        """
        U, D = block
        t = feedback + T
        codes, E = torch.empty_like(t, dtype=torch.uint8), torch.empty_like(t)
        scale, zero = grid.scale.expand_as(t), grid.zero.expand_as(t)
        for a in range(0, len(t), PANEL):
            panel = slice(a, min(a + PANEL, len(t)))
            if a:
                t[panel] += U[:a, panel].T @ E[:a]
            panel_grid = Grid(scale[panel], zero[panel])
            self.round_panel(
                U[panel, panel], T[panel], t[panel], panel_grid, maxq, codes[panel], E[panel]
            )
        # t - q = (t - T) + (T - q)
        loss = D @ t.sub_(T).add_(E).square_()
        return Rounded(codes, E, loss)

    def round_panel(
        self, U: torch.Tensor, T: torch.Tensor, t: torch.Tensor, grid: Grid, maxq: int,
        codes: torch.Tensor, E: torch.Tensor,
    ) -> None:  # fmt: skip
        """Rounds the columns of a panel one after another, each with the errors of those before it.

        Args:
            U: [n, n], the panel's block of the factor.
            T: [n, rows], target.
            t: [n, rows], T and the feedback of the columns before the panel; in place, the feedback
                of the panel's own columns is added.
            grid: scale and zero, each [n, rows]; all columns may share one memory (stride 0).
            maxq: largest code.
            codes, E: [n, rows], filled in.
        """
        for j in range(len(t)):
            if j:
                t[j].addmv_(E[:j].T, U[:j, j])
            column_grid = Grid(grid.scale[j], grid.zero[j])
            nearest = encode(t[j], column_grid, maxq)
            codes[j] = nearest.to(torch.uint8)
            torch.sub(T[j], decode(nearest, column_grid), out=E[j])

    def descend(self, panel: CodePanel, G: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Moves each code to its best value, all others fixed; see `SolverBackend`.

        The best value of column j is Q_j - G_j / Ĥ_jj; a move by δ adds δ Ĥ_j to the gradient G.
        """
        H, maxq, grids = panel.H, panel.grids.maxq, panel.grids.of_columns()
        G, change = G.clone(), torch.empty_like(G)
        for j in range(len(G)):
            grid = Grid(grids.scale[j], grids.zero[j])
            before = codes[j].to(G.dtype)
            best = (decode(before, grid) - G[j] / H[j, j]).div_(grid.scale)
            after = best.round_().add_(grid.zero).clamp_(0, maxq)
            change[j] = (after - before).mul_(grid.scale)
            codes[j] = after.to(torch.uint8)
            if j + 1 < len(G):
                G[j + 1 :].addr_(H[j + 1 :, j], change[j])
        return change

    def exchange(
        self, panel: CodePanel, G: torch.Tensor, codes: torch.Tensor, moves: int
    ) -> torch.Tensor:
        """Lets several codes of a row move together; see `SolverBackend`.

        Moving code j by k costs (k - 2 w) k s² Ĥ_jj, where w = -G_j / (s Ĥ_jj), in codes, is the way
        to the column's best value.
        """
        H, maxq, scale = panel.H, panel.grids.maxq, panel.grids.of_columns().scale
        before, row = codes.to(G.dtype), torch.arange(G.shape[1], device=G.device)
        diagonal = H.diagonal()[:, None]
        step_cost, ratio = scale.square() * diagonal, -1 / (scale * diagonal)
        now, G = before.clone(), G.clone()
        for i in range(len(G)):
            best = (G[i] * ratio[i]).clamp(-now[i], maxq - now[i]).round_()
            now[i] += best
            G.addr_(H[:, i], best * scale[i])
        for i in range(len(G)):
            wanted = G[i] * ratio[i]
            first = wanted.clamp(-now[i], maxq - now[i]).round_()
            begins = (first != 0) | (wanted.abs() >= MIN_DISTANCE)
            first = torch.where(first != 0, first, 1.0 - 2.0 * (wanted < 0).to(G.dtype))
            begins &= (first >= -now[i]) & (first <= maxq - now[i])
            total = (first - 2 * wanted) * first * step_cost[i]
            tried, gradient = now.clone(), G.addr(H[:, i], first * scale[i])
            for _ in range(moves - 1):
                ways = gradient * ratio
                steps = ways.clamp(-tried, maxq - tried).round_()
                costs = (steps - 2 * ways) * steps * step_cost
                costs[i] = 0.0  # it must not move back
                least, j = costs.min(dim=0)
                answer = torch.where(least < 0, steps[j, row], 0.0)
                total += least
                tried[j, row] += answer
                gradient += H[:, j] * (answer * scale[j, row])
            tried[i] += first
            better = begins & (total < -MIN_GAIN * step_cost[i])
            now, G = torch.where(better, tried, now), torch.where(better, gradient, G)
        codes.copy_(now.to(torch.uint8))
        return (now - before).mul_(scale)
