"""Plain torch is the algorithm: held against loops over single numbers, in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from roundwise.core.backends import reference
from roundwise.core.backends.base import PANEL, CodePanel, ColumnGrids, FactorBlock
from roundwise.core.backends.reference import TorchBackend
from roundwise.core.grid import Grid, GridSpec, minmax
from roundwise.core.linalg import factor
from roundwise.errors import NumericalError
from tests.core.oracle import damped
from tests.core.problems import layer

BACKEND = TorchBackend()


def block(columns: int, rows: int, seed: int = 0) -> tuple[FactorBlock, torch.Tensor, torch.Tensor]:
    """The last columns of a layer, T, and the feedback of columns before them."""
    W, H = layer(seed, rows, 2 * columns)
    F = factor(H, torch.arange(2 * columns), 0.01)
    E = 0.01 * torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed)).double()
    feedback = F.U[:columns, columns:].T @ E
    return FactorBlock(F.U[columns:, columns:], F.D[columns:]), W.T[columns:].contiguous(), feedback


def rounded_slowly(
    block: FactorBlock, T: torch.Tensor, feedback: torch.Tensor, grid: Grid, maxq: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes, E and loss, entry by entry; grid [n, rows]."""
    codes, E, loss = torch.zeros_like(T), torch.zeros_like(T), torch.zeros_like(T[0])
    for row, j in product(range(T.shape[1]), range(len(T))):
        scale, zero = float(grid.scale[j, row]), float(grid.zero[j, row])
        t = float(T[j, row] + feedback[j, row] + E[:j, row] @ block.U[:j, j])
        code = min(max(round(t / scale) + zero, 0), maxq)
        q = scale * (code - zero)
        codes[j, row], E[j, row] = code, T[j, row] - q
        loss[row] += block.D[j] * (t - q) ** 2
    return codes, E, loss


def known_grids(T: torch.Tensor, groups: int) -> ColumnGrids:
    index = torch.arange(len(T)) * groups // len(T)
    spec = GridSpec(3, sym=True)
    grids = [minmax(T[index == g].T, spec) for g in range(groups)]
    scale, zero = (torch.stack(part) for part in zip(*grids, strict=True))
    return ColumnGrids(Grid(scale, zero), index, spec.maxq)


@pytest.mark.parametrize("columns", [24, PANEL + 8])
def test_columns_are_rounded_one_after_another(columns: int) -> None:
    part, T, feedback = block(columns, rows=3)
    grids = known_grids(T, 4)
    rounded = BACKEND.round_known(part, T, feedback, grids)
    codes, E, loss = rounded_slowly(part, T, feedback, grids.of_columns(), grids.maxq)
    assert rounded.codes.dtype == torch.uint8
    assert torch.equal(rounded.codes.double(), codes)
    torch.testing.assert_close(rounded.E, E)
    torch.testing.assert_close(rounded.loss, loss)


@pytest.mark.parametrize("sym", [True, False])
def test_a_min_max_grid_fits_the_updated_weights(sym: bool) -> None:
    """W_g = T_g + (t_g - T_g) U_gg⁻¹: the best answer of the group's weights to earlier errors."""
    part, T, feedback = block(24, rows=5)
    spec = GridSpec(3, sym)
    grid, rounded = BACKEND.round_group(part, T, feedback, spec)
    updated = T + torch.linalg.inv(part.U).T @ feedback
    expected = minmax(updated.T, spec)
    assert torch.equal(grid.scale, expected.scale)
    assert torch.equal(grid.zero, expected.zero)
    codes, _, _ = rounded_slowly(part, T, feedback, Grid(*(x.expand_as(T) for x in grid)), 7)
    assert torch.equal(rounded.codes.double(), codes)


@pytest.mark.parametrize("search", ["mse", "pivot"])
@pytest.mark.parametrize("sym", [True, False])
def test_of_the_best_candidates_the_one_of_least_true_loss_is_kept(sym: bool, search: str) -> None:
    part, T, feedback = block(24, rows=5)
    spec = GridSpec(3, sym, flip_sign=True, search=search, keep=6)  # type: ignore[arg-type]
    grid, rounded = BACKEND.round_group(part, T, feedback, spec)
    updated = T + torch.linalg.inv(part.U).T @ feedback
    weights = spec.error_weights(part.D)
    assert weights is not None
    tried = BACKEND.search_grids(updated, weights, spec)
    losses = torch.stack(
        [
            rounded_slowly(part, T, feedback, Grid(s.expand_as(T), z.expand_as(T)), 7)[2]
            for s, z in zip(*tried, strict=True)
        ]
    )
    torch.testing.assert_close(rounded.loss, losses.amin(dim=0))
    best, rows = losses.argmin(dim=0), torch.arange(5)
    assert torch.equal(grid.scale, tried.scale[best, rows])
    assert torch.equal(grid.zero, tried.zero[best, rows])


def test_the_size_of_temporaries_does_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part, T, feedback = block(24, rows=20)
    spec = GridSpec(3, sym=True, search="pivot", keep=4)
    whole = BACKEND.round_group(part, T, feedback, spec)
    monkeypatch.setattr(reference, "WORKSPACE", 24 * 4 * 7)  # seven rows at a time
    parts = BACKEND.round_group(part, T, feedback, spec)
    for one, other in zip((*whole[0], *whole[1]), (*parts[0], *parts[1]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("search", ["minmax", "pivot"])
def test_a_scale_too_large_for_float16_is_an_error(search: str) -> None:
    part, T, feedback = block(8, rows=2)
    spec = GridSpec(4, sym=True, search=search)  # type: ignore[arg-type]
    with pytest.raises(NumericalError, match="float16"):
        BACKEND.round_group(part, 1e9 * T, feedback, spec)


class TestCodes:
    """Descent and exchange on a panel."""

    def panel(
        self, columns: int = 16, rows: int = 4
    ) -> tuple[CodePanel, torch.Tensor, torch.Tensor]:
        """A panel, its target T, and codes of rounding to nearest."""
        W, H = layer(1, rows, columns)
        T = W.T.contiguous()
        grids = known_grids(T, 2)
        scale, zero = grids.of_columns()
        codes = (T / scale).round().add(zero).clamp(0, grids.maxq).to(torch.uint8)
        return CodePanel(damped(H, 0.01), grids), T, codes

    def losses(self, panel: CodePanel, T: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        E = self.values(panel, codes) - T
        return (E * (panel.H @ E)).sum(dim=0)

    def values(self, panel: CodePanel, codes: torch.Tensor) -> torch.Tensor:
        scale, zero = panel.grids.of_columns()
        return scale * (codes.double() - zero)

    def gradient(self, panel: CodePanel, T: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return panel.H @ (self.values(panel, codes) - T)

    def test_descent_takes_the_best_code_of_each_column_in_turn(self) -> None:
        panel, T, codes = self.panel()
        expected = codes.clone()
        for j in range(len(T)):
            tried = []
            for code in range(panel.grids.maxq + 1):
                expected[j] = code
                tried.append(self.losses(panel, T, expected))
            expected[j] = torch.stack(tried).argmin(dim=0).to(torch.uint8)
        improved = codes.clone()
        change = BACKEND.descend(panel, self.gradient(panel, T, codes), improved)
        assert torch.equal(improved, expected)
        assert not torch.equal(improved, codes)
        moved = self.values(panel, improved) - self.values(panel, codes)
        torch.testing.assert_close(change, moved)

    @pytest.mark.parametrize("moves", [2, 5])
    def test_an_exchange_improves_on_descent_or_changes_nothing(self, moves: int) -> None:
        panel, T, codes = self.panel()
        while True:  # descent to its end
            before = codes.clone()
            BACKEND.descend(panel, self.gradient(panel, T, codes), codes)
            if torch.equal(codes, before):
                break
        improved = codes.clone()
        change = BACKEND.exchange(panel, self.gradient(panel, T, codes), improved, moves)
        before, after = (self.losses(panel, T, each) for each in (codes, improved))
        changed = (improved != codes).any(dim=0)
        assert changed.any()
        assert (after[changed] < before[changed]).all()
        moved = self.values(panel, improved) - self.values(panel, codes)
        torch.testing.assert_close(change, moved)

    def test_more_moves_lose_less_together(self) -> None:
        panel, T, codes = self.panel(columns=32, rows=16)
        totals = []
        for moves in (1, 2, 8):
            improved = codes.clone()
            BACKEND.exchange(panel, self.gradient(panel, T, codes), improved, moves)
            totals.append(float(self.losses(panel, T, improved).sum()))
        assert totals[2] < totals[1] < totals[0]
