"""The solver's Triton programs give the codes of plain torch.

Without a CUDA device they run in Triton's interpreter: slow, but the same programs. Another test
compiles them for a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from roundwise.config import QuantizeConfig
from roundwise.core import solver
from roundwise.core.backends import cpp
from roundwise.core.backends.base import CodePanel, ColumnGrids
from roundwise.core.backends.reference import TorchBackend
from roundwise.core.backends.triton import TritonBackend
from roundwise.core.grid import Grid, GridSpec
from roundwise.core.grid_search import candidates
from roundwise.core.solver import prepare_hessian, solve
from tests.hopper import compiles

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_cuda = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the native extension, and at first in plain torch."""
    monkeypatch.setattr(cpp, "load", lambda: (None, cpp.Status(None, "test")))
    monkeypatch.setattr(solver, "choose_backend", lambda _: TorchBackend())


@pytest.fixture
def use_triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Switches the programs on."""
    return lambda: monkeypatch.setattr(solver, "choose_backend", lambda _: TritonBackend())


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W [rows, columns] and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    W, X, mix = (
        torch.randn(*shape, generator=generator)
        for shape in ((rows, columns), (8 * columns, columns), (columns, columns))
    )
    X = X @ mix
    return W.to(DEVICE), (X.T @ X / len(X)).to(DEVICE)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "textbook", "bits": 4},
        {"refine": 0, "bits": 3, "grid_candidates": 3},
        {"refine": 0, "bits": 2, "sym": False, "desc_act": True, "grid_candidates": 2},
        {"refine": 0, "bits": 8, "sym": False, "order": "static"},
        {"exchange": 1, "bits": 3, "group_size": -1, "grid_candidates": 1},
        {"exchange": 3, "bits": 2, "grid_candidates": 1},
    ],
)
def test_a_weight_gets_the_same_codes(settings: dict[str, Any], use_triton: Any) -> None:
    W, H = problem(18, 64)
    config = QuantizeConfig(**{"group_size": 32, **settings})
    plain = solve(W, H, config)
    use_triton()
    q = solve(W, H, config)
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(q, name), getattr(plain, name))
    assert q.relative_error == pytest.approx(plain.relative_error, rel=1e-5)


def test_more_columns_than_a_panel_has(use_triton: Any) -> None:
    W, H = problem(5, 160)
    config = QuantizeConfig(recipe="textbook", group_size=-1)
    plain = solve(W, H, config)
    use_triton()
    assert torch.equal(solve(W, H, config).codes, plain.codes)


@pytest.mark.parametrize("sym", [True, False])
def test_grids_cost_the_same(sym: bool) -> None:
    W, H = problem(20, 70)  # neither fills its tiles
    grids = candidates(W.T, GridSpec(3, sym, min_zero=1))
    grids = Grid(*(part[::17] for part in grids))
    D = H.diagonal()
    scores, plain = (
        backend.score_grids(W.T, D, grids, 7) for backend in (TritonBackend(), TorchBackend())
    )
    torch.testing.assert_close(scores, plain)


@pytest.mark.parametrize("moves", [1, 2, 5])
def test_codes_are_improved_alike(moves: int) -> None:
    W, H = problem(3, 40)
    n, rows, maxq = 40, 3, 7
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, maxq + 1, (n, rows), generator=generator, dtype=torch.uint8).to(DEVICE)
    scale = torch.tensor([[0.3, -0.25, 0.4], [0.2, 0.35, -0.3]], device=DEVICE)
    grids = Grid(scale, torch.full_like(scale, 4.0))
    index = torch.arange(n, device=DEVICE) // 20
    E = (codes - grids.zero[index]) * scale[index] - W.T
    wide = torch.cat([H, H], dim=1)[:, :n]  # rows that are longer than the panel
    panel = CodePanel(wide, ColumnGrids(grids, index, maxq))
    improved, changes = [], []
    for backend in (TritonBackend(), TorchBackend()):
        improved.append(codes.clone())
        if moves == 1:
            changes.append(backend.descend(panel, H @ E, improved[-1]))
        else:
            changes.append(backend.exchange(panel, H @ E, improved[-1], moves))
    assert torch.equal(improved[0], improved[1])
    assert not torch.equal(improved[0], codes)
    torch.testing.assert_close(changes[0], changes[1])


COMPILED = """
import roundwise.core.backends.triton_kernels as programs

for name, constants in (
    ("round_panel", dict(N=128, R=16)), ("score_grids", dict(N=64, R=16)),
    ("descend", dict(N=128, R=16)), ("exchange", dict(N=1024)),
):
    function = getattr(programs, name)
    numbers = {"n", "rows", "maxq", "moves"}
    types = {n: "i32" if n in numbers or n.endswith("_stride") else "*fp32" for n in function.arg_names}
    types |= dict(index_ptr="*i64", codes_ptr="*u8")
    build(function, types, constants, 4, lambda n: n.endswith(("_ptr", "_stride")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_compiles_for_hopper(tmp_path: Path) -> None:
    compiles(COMPILED, tmp_path)


@needs_cuda
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_large_weights_are_solved_as_well(bits: int, sym: bool, use_triton: Any) -> None:
    W, H = problem(1024, 2048)
    config = QuantizeConfig(bits=bits, sym=sym)
    ready = prepare_hessian(H, config)
    plain = solve(W, ready, config)
    use_triton()
    first, second = (solve(W, ready, config) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)
    assert first.relative_error == pytest.approx(plain.relative_error, rel=2e-3)
