"""The search finds the candidate of least weighed error, and never a worse grid than min-max."""

from __future__ import annotations

import pytest
import torch

from roundwise.core.grid import GridSpec, decode, encode, minmax
from roundwise.core.grid_search import SHRINK, best_grids, candidates, score_grids

SPECS = [
    GridSpec(bits, sym, min_zero, flip_sign, "pivot", 4)
    for bits in (2, 3, 4, 5, 6, 7, 8)
    for sym, min_zero, flip_sign in (
        (True, 0, True), (True, 0, False), (False, 0, True), (False, 1, True),
    )
]  # fmt: skip


def group(columns: int = 32, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """W [columns, rows] with an outlier in each row, and weights of errors."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(columns, rows, generator=generator, dtype=torch.float64)
    W[3] *= 4
    return W, torch.rand(columns, generator=generator, dtype=torch.float64) + 0.1


def cost(w: torch.Tensor, D: torch.Tensor, scale: float, zero: float, maxq: int) -> float:
    """Σ_j D_j (w_j - q_j)² of one row, with plain numbers."""
    total = 0.0
    for weight, d in zip(w.tolist(), D.tolist(), strict=True):
        code = min(max(round(weight / scale) + zero, 0), maxq)
        total += d * (weight - scale * (code - zero)) ** 2
    return total


def test_scores_are_weighed_squared_errors() -> None:
    W, D = group()
    grids = candidates(W, SPECS[0])
    scores = score_grids(W, D, grids, 3)
    assert scores.shape == grids.scale.shape
    for c in range(0, len(scores), 17):
        for row in range(W.shape[1]):
            scale, zero = float(grids.scale[c, row]), float(grids.zero[c, row])
            assert float(scores[c, row]) == pytest.approx(cost(W[:, row], D, scale, zero, 3))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_best_come_first(spec: GridSpec) -> None:
    W, D = group()
    grids, best = candidates(W, spec), best_grids(W, D, spec)
    assert best.scale.shape == (spec.keep, W.shape[1])
    found, every = (score_grids(W, D, each, spec.maxq) for each in (best, grids))
    assert torch.equal(found, every.sort(dim=0).values[: spec.keep])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_candidates_are_grids_that_a_file_can_hold(spec: GridSpec) -> None:
    grids = candidates(group()[0], spec)
    assert torch.equal(grids.scale, grids.scale.half().double())
    assert torch.equal(grids.zero, grids.zero.round())
    if spec.sym:
        assert len(grids.scale) == len(SHRINK) * (2 if spec.flip_sign else 1)
        assert (grids.zero == 2 ** (spec.bits - 1)).all()
        assert bool((grids.scale < 0).any()) == spec.flip_sign
    else:
        assert (grids.scale > 0).all()
        assert spec.min_zero <= int(grids.zero.min())
        assert int(grids.zero.max()) <= spec.maxq


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_no_worse_than_the_range_of_the_weights(bits: int, sym: bool) -> None:
    W, D = group()
    spec = GridSpec(bits, sym, search="pivot")
    grid, best = minmax(W.T, spec), best_grids(W, D, spec)
    error = decode(encode(W, grid, spec.maxq), grid).sub_(W).square_()
    assert (score_grids(W, D, best, spec.maxq)[0] <= 1.001 * D @ error).all()


def test_a_range_can_be_flipped() -> None:
    """A negative scale puts the one code more of a symmetric grid above zero."""
    W = torch.tensor([[2.0], [1.0], [0.0], [-1.0]])
    D = torch.ones(4)
    flipped = best_grids(W, D, GridSpec(2, sym=True, search="mse"))
    assert flipped.scale.tolist() == [[-1.0]]
    positive = best_grids(W, D, GridSpec(2, sym=True, flip_sign=False, search="mse"))
    scores = [float(score_grids(W, D, each, 3)) for each in (flipped, positive)]
    assert scores[0] == 0.0 < scores[1]


def test_the_first_of_equal_grids_wins() -> None:
    W = torch.zeros(4, 2)  # all grids cost nothing
    best = best_grids(W, torch.ones(4), GridSpec(4, sym=True, search="mse", keep=2))
    grids = candidates(W, GridSpec(4, sym=True))
    assert torch.equal(best.scale, grids.scale[:2])
