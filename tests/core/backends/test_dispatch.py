"""One place chooses the backend, by device, dtype, and what is installed."""

from __future__ import annotations

import pytest
import torch

from roundwise import QuantizeConfig
from roundwise.core import solver
from roundwise.core.backends import cpp, triton
from roundwise.core.backends.base import SolverBackend
from roundwise.core.backends.dispatch import choose_backend
from tests.core.native import needs_native, using
from tests.core.problems import layer

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_native
@FLOATS
def test_cpp_on_the_cpu(dtype: torch.dtype) -> None:
    assert choose_backend(torch.zeros(2, dtype=dtype)).name == "cpp"


@FLOATS
def test_torch_on_the_cpu_without_the_extension(dtype: torch.dtype) -> None:
    with using(None):
        assert not cpp.available()
        assert choose_backend(torch.zeros(2, dtype=dtype)).name == "torch"


def test_torch_for_what_no_other_backend_takes() -> None:
    assert choose_backend(torch.zeros(2, dtype=torch.float16)).name == "torch"
    assert choose_backend(torch.zeros(2, device="meta")).name == "torch"


@needs_cuda
def test_on_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    single, double = (
        torch.zeros(2, device="cuda", dtype=d) for d in (torch.float32, torch.float64)
    )
    assert choose_backend(single).name == ("triton" if triton.available() else "torch")
    assert choose_backend(double).name == "torch"
    monkeypatch.setattr(triton, "available", lambda: False)
    assert choose_backend(single).name == "torch"


def test_a_weight_is_solved_with_one_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[SolverBackend] = []

    def choose(tensor: torch.Tensor) -> SolverBackend:
        chosen.append(choose_backend(tensor))
        return chosen[-1]

    monkeypatch.setattr(solver, "choose_backend", choose)
    monkeypatch.setattr(solver, "ROW_WORKSPACE", 64 * 4)
    W, H = layer(0, rows=24, width=64)
    solver.solve(W, H, QuantizeConfig(group_size=16))
    assert len(chosen) == 1
