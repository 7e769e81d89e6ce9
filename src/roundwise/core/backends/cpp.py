"""The C++ extension: what it is used for, and why not where it is not.

Everything it does exists in plain torch as well (`core/recursion.py`, `core/packing.py`), tested to give
the same codes; it is only much faster. It takes float32 and float64 tensors, and codes, on the CPU;
`core/gpu.py` is its like for GPUs.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from roundwise.core.grid import MAX_SCALE, Grid
from roundwise.errors import ConfigError, NumericalError

#: Environment variable: "off", or the instruction set to use instead of the best there is.
VARIABLE = "ROUNDWISE_NATIVE"


class Status(NamedTuple):
    """Whether the extension is used."""

    active: str | None
    """The instruction set in use; None: plain torch."""
    reason: str
    """Why, in a few words."""


@cache
def load() -> tuple[Any, Status]:
    """The extension's module (None where it is not used), and the reason.

    Raises:
        ConfigError: the environment asks for an instruction set that is not there.
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
    module.use_team(_openmp())
    if wanted:
        if wanted not in module.instruction_sets():
            known = ", ".join(module.instruction_sets())
            raise ConfigError(f"{VARIABLE}={wanted}: this processor has {known}; or use off")
        module.use(wanted)
        return module, Status(wanted, f"chosen by {VARIABLE}")
    return module, Status(module.active(), "the best this processor has")


def _openmp() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded; 0 where there is none.

    Threads of two runtimes would fight for the same cores: torch's spin for a while after each product.
    """
    try:
        with Path("/proc/self/maps").open(encoding="utf-8") as maps:
            files = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line}
    except OSError:  # no Linux
        return 0
    for file in sorted(files, key=lambda file: ("torch" not in file, file)):
        if re.search(r"lib[gi]?omp\d?[-.\w]*$", file):
            with suppress(OSError, AttributeError):
                function = ctypes.CDLL(file).GOMP_parallel
                return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def usable(tensor: torch.Tensor) -> bool:
    """The extension is there and takes tensors like this one."""
    other = (torch.float16, torch.bfloat16)
    return tensor.device.type == "cpu" and tensor.dtype not in other and load()[0] is not None


def products(dtype: torch.dtype) -> torch.dtype | None:
    """In which type `add_moment` multiplies inputs of this one; None: it does not take them."""
    module = load()[0]
    if module is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    return dtype if dtype == torch.float32 or module.has_bf16() else None


def add_moment(
    C: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
    *, lower: bool = False, transposed: bool = False, scale: float = 1.0,
) -> None:  # fmt: skip
    """C += scale · Aᵀ B in float32: A [tokens, m], B [tokens, n], C [m, n] float32.

    Rows must be contiguous; the distance between them is free.

    Args:
        lower: A is B, up to a factor; blocks above the diagonal are left as they are.
        transposed: A is given as [m, tokens], float32; C += scale · A B then.
    """
    module, threads = load()[0], torch.get_num_threads()
    if A.dtype == torch.bfloat16:
        halves = (X.view(torch.uint16) for X in (A, B))
        module.moment_bf16(*halves, C, lower, transposed, scale, threads)
    else:
        module.moment(A, B, C, lower, transposed, scale, threads)


def round_group(
    U: torch.Tensor, D: torch.Tensor, target: torch.Tensor, feedback: torch.Tensor,
    *, weights: torch.Tensor | None, shrink: torch.Tensor, keep: int, maxq: int, min_zero: int,
    sym: bool, flip_sign: bool,
) -> tuple[Grid, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`core.recursion.round_group`, natively."""
    scale, zero, loss = (torch.empty_like(target[0]) for _ in range(3))
    codes, E = torch.empty_like(target, dtype=torch.uint8), torch.empty_like(target)
    fits = load()[0].group(
        U, D, target, feedback, weights is not None, D if weights is None else weights, shrink,
        keep, maxq, min_zero, sym, flip_sign, scale, zero, loss, codes, E, torch.get_num_threads(),
    )  # fmt: skip
    if not fits:
        raise NumericalError(f"a scale does not fit float16 (largest {MAX_SCALE:g})")
    return Grid(scale, zero), codes, E, loss


def round_known(
    U: torch.Tensor, D: torch.Tensor, target: torch.Tensor, feedback: torch.Tensor, grids: Grid,
    index: torch.Tensor, maxq: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`core.recursion.round_known`, natively."""
    codes, E = torch.empty_like(target, dtype=torch.uint8), torch.empty_like(target)
    loss = torch.empty_like(target[0])
    load()[0].known(
        U, D, target, feedback, grids.scale, grids.zero, index, maxq, loss, codes, E,
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, E, loss


def descend(
    H: torch.Tensor, G: torch.Tensor, grids: Grid, index: torch.Tensor, maxq: int,
    codes: torch.Tensor, moves: int,
) -> torch.Tensor:  # fmt: skip
    """`core.recursion.descend` and `exchange`, natively."""
    change = torch.empty_like(G)
    load()[0].descend(
        H, G, grids.scale, grids.zero, index, maxq, codes, change, moves, torch.get_num_threads()
    )
    return change


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [in·bits/32, out] of uint8 codes [out, in], which must be contiguous."""
    words = torch.empty(codes.shape[1] * bits // 32, codes.shape[0], dtype=torch.int32)
    load()[0].pack(codes, bits, words, torch.get_num_threads())
    return words
