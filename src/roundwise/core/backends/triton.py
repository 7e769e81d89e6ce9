"""The solver's Triton programs: what they are used for, and their launch.

They take float32 tensors on CUDA devices. Everything they do exists in plain torch as well
(`core/recursion.py`, `core/search.py`), which runs where they do not, some column by column.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch

from roundwise.core.grid import Grid

#: Rows of a tile; columns of a tile while grids are compared.
ROWS, COLUMNS = 16, 64


@cache
def available() -> bool:
    """Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def usable(tensor: torch.Tensor) -> bool:
    """The programs take tensors like this one."""
    return tensor.device.type == "cuda" and tensor.dtype == torch.float32 and available()


@cache
def _programs() -> Any:

    from roundwise.core.backends import triton_kernels

    return triton_kernels


def round_panel(
    U: torch.Tensor, T: torch.Tensor, t: torch.Tensor, grid: Grid, maxq: int,
    codes: torch.Tensor, E: torch.Tensor,
) -> None:  # fmt: skip
    """Rounds the columns of a panel one after another, as `core.recursion` says.

    Args:
        U: [n, n], the panel's block of the factor.
        T: [n, rows], the target.
        t: [n, rows], T and what finished columns ask for; what the panel's own ask for is added.
        grid: [n, rows] or of stride 0 along the columns.
        maxq: largest code.
        codes, E: [n, rows], filled in.
    """
    n, rows = t.shape
    _launch(
        t, "rounding", (-(-rows // ROWS),), U, T, t, grid.scale, grid.zero, codes, E, n, rows, maxq,
        U.stride(0), T.stride(0), t.stride(0), grid.scale.stride(0), codes.stride(0), E.stride(0),
        N=_power(n), R=ROWS,
    )  # fmt: skip


def scores(W: torch.Tensor, D: torch.Tensor, grids: Grid, maxq: int) -> torch.Tensor:
    """[candidates, rows]: squared errors of W [n, rows], weighed by D [n], with each of the grids."""
    n, rows = W.shape
    W, D = W.contiguous(), D.contiguous()  # solved systems and diagonals are not
    found = torch.empty_like(grids.scale)
    _launch(
        W, "scores", (-(-rows // ROWS), len(found)), W, D, grids.scale.contiguous(),
        grids.zero.contiguous(), found, n, rows, maxq, W.stride(0), N=COLUMNS, R=ROWS,
    )  # fmt: skip
    return found


def descend(
    H: torch.Tensor, G: torch.Tensor, grids: Grid, index: torch.Tensor, maxq: int,
    codes: torch.Tensor, moves: int,
) -> torch.Tensor:  # fmt: skip
    """`core.recursion.descend`, or `exchange` with more than one move."""
    n, rows = G.shape
    change = torch.empty_like(G)
    H = H if H.stride(1) == 1 else H.contiguous()
    shapes = (n, rows, maxq)
    if moves > 1:
        _launch(
            G, "exchanging", (rows,), H, G, grids.scale, index, codes, change, *shapes, moves,
            H.stride(0), G.stride(0), N=_power(n),
        )  # fmt: skip
    else:
        _launch(
            G, "descending", (-(-rows // ROWS),), H, G, *grids, index, codes, change, *shapes,
            H.stride(0), G.stride(0), N=_power(n), R=ROWS,
        )  # fmt: skip
    return change


def _power(n: int) -> int:
    """The power of two that holds n columns."""
    return max(16, 1 << (n - 1).bit_length())


def _launch(
    where: torch.Tensor, program: str, grid: tuple[int, ...], *args: Any, **sizes: int
) -> None:
    launch = getattr(_programs(), program)[grid]
    if where.is_cuda:
        with torch.cuda.device(where.device):
            launch(*args, **sizes, num_warps=4)
    else:  # Triton's interpreter
        launch(*args, **sizes)
