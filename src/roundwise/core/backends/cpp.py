"""The C++ extension: its loading, its matrix products, its packing, and the solver backend made of it.

Everything it does exists in plain torch as well (`core/backends/reference.py`, `core/linalg.py`,
`core/quantized_weight.py`) and is tested to give the same codes; it is only much faster. It takes
tensors on the CPU.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from roundwise.core.backends.base import CodePanel, ColumnGrids, FactorBlock, Rounded
from roundwise.core.grid import MAX_SCALE, Grid, GridSpec
from roundwise.core.grid_search import SHRINK, best_grids
from roundwise.errors import ConfigError, NumericalError

#: Environment variable: "off", or the instruction set to use instead of the best there is.
VARIABLE = "ROUNDWISE_NATIVE"


class Status(NamedTuple):
    """State of the extension: used or not, and why."""

    active: str | None
    """The instruction set in use; None: plain torch."""
    reason: str
    """Why, in a few words."""


@cache
def load() -> tuple[Any, Status]:
    """Returns the extension's module (None where it is not used), and the reason.

    Raises:
        ConfigError: the environment asks for an instruction set that this processor lacks, or for an
            extension that is not built.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        return None, Status(None, f"switched off by {VARIABLE}=off")
    try:
        module = importlib.import_module("roundwise._native")
    except ImportError as error:
        if wanted:
            raise ConfigError(
                f"{VARIABLE}={wanted}, but the extension is missing: {error}"
            ) from error
        return None, Status(
            None, f"not built ({error}): install a C++ compiler and roundwise again"
        )
    module.use_team(_openmp_entry())
    if wanted:
        if wanted not in module.instruction_sets():
            known = ", ".join(module.instruction_sets())
            raise ConfigError(f"{VARIABLE}={wanted}: this processor has {known}; or use off")
        module.use(wanted)
        return module, Status(wanted, f"chosen by {VARIABLE}")
    return module, Status(module.active(), "the best this processor has")


def available() -> bool:
    """Returns whether the extension is used."""
    return load()[0] is not None


def _openmp_entry() -> int:
    """Returns the address of GOMP_parallel in the OpenMP runtime that torch has loaded; 0 if none.

    The extension runs on torch's threads: threads of a second runtime would compete with torch's for
    the same cores, since torch's spin for a while after each product.
    """
    try:
        with Path("/proc/self/maps").open(encoding="utf-8") as maps:
            files = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line}
    except OSError:  # not Linux
        return 0
    for file in sorted(files, key=lambda file: ("torch" not in file, file)):
        if re.search(r"lib[gi]?omp\d?[-.\w]*$", file):
            with suppress(OSError, AttributeError):
                function = ctypes.CDLL(file).GOMP_parallel
                return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def product_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """Dtype in which `add_moment` multiplies inputs of `dtype`; None if unsupported."""
    module = load()[0]
    if module is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    return dtype if dtype == torch.float32 or module.has_bf16() else None


def add_moment(
    C: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *, lower: bool = False, scale: float = 1.0
) -> None:
    """Adds scale · Aᵀ B to C in place; sums are float32.

    Rows must be contiguous; the distance between them is free.

    Args:
        C: [m, n], float32.
        A: [tokens, m], float32 or bfloat16.
        B: [tokens, n], of A's dtype.
        lower: A is B, up to a factor; blocks above the diagonal are not computed.
        scale: factor of what is added.
    """
    module, threads = load()[0], torch.get_num_threads()
    if A.dtype == torch.bfloat16:
        halves = (X.view(torch.uint16) for X in (A, B))
        module.moment_bf16(*halves, C, lower, False, scale, threads)
    else:
        module.moment(A, B, C, lower, False, scale, threads)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs contiguous uint8 codes [out, in] into int32 words [in·bits/32, out]."""
    words = torch.empty(codes.shape[1] * bits // 32, codes.shape[0], dtype=torch.int32)
    load()[0].pack(codes, bits, words, torch.get_num_threads())
    return words


class CppBackend:
    """The solver's loops in C++, rows in parallel; float32 and float64 on the CPU.

    Args:
        extension: the module that `load` returns.
    """

    name: ClassVar[str] = "cpp"

    def __init__(self, extension: Any) -> None:
        self._extension = extension

    def search_grids(self, W: torch.Tensor, weights: torch.Tensor, spec: GridSpec) -> Grid:
        """Searches the best grids of one group, in plain torch; see `SolverBackend`."""
        return best_grids(W, weights, spec)

    def round_group(
        self, block: FactorBlock, T: torch.Tensor, feedback: torch.Tensor, spec: GridSpec
    ) -> tuple[Grid, Rounded]:
        """Finds the grid of one group and rounds its columns; see `SolverBackend`."""
        # As `GridSpec.error_weights`, which is not called for each group of each weight.
        weights = torch.ones_like(block.D) if spec.search == "mse" else block.D
        scale, zero, loss = (torch.empty_like(T[0]) for _ in range(3))
        codes, E = torch.empty_like(T, dtype=torch.uint8), torch.empty_like(T)
        fits = self._extension.group(
            block.U, block.D, T, feedback, spec.search != "minmax", weights, SHRINK.to(T), spec.keep,
            (1 << spec.bits) - 1, spec.min_zero, spec.sym, spec.flip_sign, scale, zero, loss, codes, E,
            torch.get_num_threads(),
        )  # fmt: skip
        if not fits:
            raise NumericalError(f"a scale does not fit float16 (largest {MAX_SCALE:g})")
        return Grid(scale, zero), Rounded(codes, E, loss)

    def round_known(
        self, block: FactorBlock, T: torch.Tensor, feedback: torch.Tensor, grids: ColumnGrids
    ) -> Rounded:
        """Rounds columns whose grids are known; see `SolverBackend`."""
        codes, E = torch.empty_like(T, dtype=torch.uint8), torch.empty_like(T)
        loss = torch.empty_like(T[0])
        self._extension.known(
            block.U, block.D, T, feedback, *grids.groups, grids.index, grids.maxq, loss, codes, E,
            torch.get_num_threads(),
        )  # fmt: skip
        return Rounded(codes, E, loss)

    def descend(self, panel: CodePanel, G: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Moves each code to its best value, all others fixed; see `SolverBackend`."""
        return self.exchange(panel, G, codes, moves=1)

    def exchange(
        self, panel: CodePanel, G: torch.Tensor, codes: torch.Tensor, moves: int
    ) -> torch.Tensor:
        """Lets several codes of a row move together; see `SolverBackend`. One move: descent."""
        grids, change = panel.grids, torch.empty_like(G)
        self._extension.descend(
            panel.H, G, *grids.groups, grids.index, grids.maxq, codes, change, moves,
            torch.get_num_threads(),
        )  # fmt: skip
        return change
