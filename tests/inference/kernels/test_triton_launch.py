"""The operator `roundwise::triton_linear`: tilings, graphs and compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from roundwise.inference.kernels.triton import TritonKernel
from roundwise.inference.kernels.triton_launch import DeviceLimits, choose_tiling
from tests.inference.kernels.on_device import on_cuda, rows, weight
from tests.inference.kernels.packed import (
    layer_of,
)

H100 = DeviceLimits(processors=132, shared_memory=232448)


def arguments(kernel: TritonKernel) -> tuple[Any, ...]:
    return (
        kernel.words, kernel.scales, kernel.zeros, kernel.order, kernel.groups, kernel.bits,
        kernel.zero, kernel.group_size,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("group_size", "act_order", "sym"), [(32, False, True), (32, True, False), (20, True, False)]
)
def test_the_op_is_what_torch_expects_of_one(group_size: int, act_order: bool, sym: bool) -> None:
    kernel = TritonKernel(weight(160, 64, 4, group_size, act_order=act_order, sym=sym))
    for count in (1, 3):
        torch.library.opcheck(
            torch.ops.roundwise.triton_linear.default,
            (rows(count, 160, torch.bfloat16), *arguments(kernel)),
        )


# torch's compiler instantiates autograd functions, and torch warns of it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_one_graph() -> None:
    linear = layer_of(weight(128, 64, 4, 32))
    linear.prepare("triton")
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (2, 5):
        x = rows(count, 128)
        with torch.no_grad():
            assert torch.equal(compiled(x), linear(x))
    x, same = (rows(5, 128).requires_grad_() for _ in range(2))
    compiled(x).sum().backward()
    linear(same).sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_tilings_fit_small_devices(bits: int, size: int) -> None:
    small = DeviceLimits(
        processors=46, shared_memory=101376
    )  # compute capability 8.6, 8.9 and 12.0
    for count in (1, 16, 17, 64, 65, 4096):
        for run in (0, 32, 96, 128, 4096):
            for device in (small, H100):
                tiling = choose_tiling(count, 4096, run, bits, size, device)
                assert tiling.shared_memory(bits, size) <= device.shared_memory
                assert run % tiling.BK == 0
                splits = tiling.splits(count, 4096, 4096, device)
                assert splits == 1 or 4096 // splits >= 4 * tiling.BK


@on_cuda
@pytest.mark.parametrize("count", [1, 64])
def test_is_captured_in_a_graph(count: int) -> None:
    linear = layer_of(weight(2048, 1024, 4, 128, act_order=True))
    x = rows(count, 2048, torch.bfloat16)
    with torch.no_grad():
        linear(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x)
        for seed in (1, 2):
            x.copy_(rows(count, 2048, torch.bfloat16, seed))
            graph.replay()
            assert torch.equal(y, linear(x))


@on_cuda
def test_compiles_with_inductor_and_graphs() -> None:
    linear = layer_of(weight(1024, 512, 4, 128))
    linear.prepare()
    compiled = torch.compile(linear, mode="reduce-overhead", fullgraph=True)
    x = rows(1, 1024, torch.bfloat16)
    with torch.no_grad():
        for _ in range(4):
            y = compiled(x).clone()
        torch.testing.assert_close(y, linear(x))
