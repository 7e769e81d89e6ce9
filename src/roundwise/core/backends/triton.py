"""The solver backend for CUDA devices: launches the Triton programs in `triton_kernels`.

They take float32 tensors. What they do not do is plain torch, inherited from `TorchBackend`.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any, ClassVar

import torch

from roundwise.core.backends.base import CodePanel
from roundwise.core.backends.reference import TorchBackend
from roundwise.core.grid import Grid

#: Rows of a tile; columns of a tile while grids are compared.
ROWS, COLUMNS = 16, 64


@cache
def available() -> bool:
    """Returns whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


class TritonBackend(TorchBackend):
    """Triton programs where plain torch would launch kernels column by column or grid by grid."""

    name: ClassVar[str] = "triton"

    def score_grids(self, W: torch.Tensor, D: torch.Tensor, grids: Grid, maxq: int) -> torch.Tensor:
        """Returns what rounding W to each candidate costs; see `core.grid_search.score_grids`."""
        n, rows = W.shape
        W, D = W.contiguous(), D.contiguous()  # solved systems and diagonals are not
        scores = torch.empty_like(grids.scale)
        _launch(
            W, "score_grids", (-(-rows // ROWS), len(scores)), W, D, grids.scale.contiguous(),
            grids.zero.contiguous(), scores, n, rows, maxq, W.stride(0), N=COLUMNS, R=ROWS,
        )  # fmt: skip
        return scores

    def round_panel(
        self, U: torch.Tensor, T: torch.Tensor, t: torch.Tensor, grid: Grid, maxq: int,
        codes: torch.Tensor, E: torch.Tensor,
    ) -> None:  # fmt: skip
        """Rounds the columns of a panel one after another; see `TorchBackend`."""
        n, rows = t.shape
        _launch(
            t, "round_panel", (-(-rows // ROWS),), U, T, t, grid.scale, grid.zero, codes, E, n,
            rows, maxq, U.stride(0), T.stride(0), t.stride(0), grid.scale.stride(0),
            codes.stride(0), E.stride(0), N=_padded(n), R=ROWS,
        )  # fmt: skip

    def descend(self, panel: CodePanel, G: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Moves each code to its best value, all others fixed; see `SolverBackend`."""
        n, rows = G.shape
        H, grids, change = _contiguous_rows(panel.H), panel.grids, torch.empty_like(G)
        _launch(
            G, "descend", (-(-rows // ROWS),), H, G, *grids.groups, grids.index, codes, change, n,
            rows, grids.maxq, H.stride(0), G.stride(0), N=_padded(n), R=ROWS,
        )  # fmt: skip
        return change

    def exchange(
        self, panel: CodePanel, G: torch.Tensor, codes: torch.Tensor, moves: int
    ) -> torch.Tensor:
        """Lets several codes of a row move together; see `SolverBackend`."""
        n, rows = G.shape
        H, grids, change = _contiguous_rows(panel.H), panel.grids, torch.empty_like(G)
        _launch(
            G, "exchange", (rows,), H, G, grids.groups.scale, grids.index, codes, change, n, rows,
            grids.maxq, moves, H.stride(0), G.stride(0), N=_padded(n),
        )  # fmt: skip
        return change


def _contiguous_rows(H: torch.Tensor) -> torch.Tensor:
    """Returns H, copied if its rows are not contiguous."""
    return H if H.stride(1) == 1 else H.contiguous()


def _padded(n: int) -> int:
    """Returns the power of two that holds n columns."""
    return max(16, 1 << (n - 1).bit_length())


@cache
def _programs() -> Any:
    """Imports the Triton programs, which need triton."""
    from roundwise.core.backends import triton_kernels

    return triton_kernels


def _launch(
    tensor: torch.Tensor, program: str, grid: tuple[int, ...], *args: Any, **sizes: int
) -> None:
    """Launches a program on the device of `tensor`; on the CPU only Triton's interpreter can run it."""
    launch = getattr(_programs(), program)[grid]
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            launch(*args, **sizes, num_warps=4)
    else:
        launch(*args, **sizes)
