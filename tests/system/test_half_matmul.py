"""Half-precision matmuls in float32 differ by at most one rounding; inputs of experts are padded."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from roundwise.system.half_matmul import (
    REPLACEMENTS,
    CpuHalfMatmul,
    cpu_half_matmul,
    has_native_matmul,
    needs_half_matmul,
    padded_rows,
)

HALF = frozenset((torch.bfloat16, torch.float16))
half = pytest.mark.parametrize("dtype", sorted(HALF, key=str))


#: Prints the growth in kilobytes over products of an expert with 300 different numbers of tokens.
GROWTH = """
import torch
from contextlib import nullcontext
from roundwise.system.half_matmul import cpu_half_matmul
torch.set_num_threads(1)
def size():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmRSS" in line)
W = torch.randn(768, 768).bfloat16()
torch.nn.functional.linear(torch.randn(900, 768).bfloat16(), W)
before = size()
with {mode}:
    for rows in range(500, 800):
        torch.nn.functional.linear(torch.randn(rows, 768).bfloat16(), W)
print(size() - before)
"""


class Seen(TorchFunctionMode):
    """Records the dtype of the first operand of every matmul that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in REPLACEMENTS:
            self.types.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def near(y: torch.Tensor, exact: torch.Tensor) -> bool:
    """Differs by no more than one rounding of the result, and the error of a float32 sum."""
    step = torch.finfo(y.dtype).eps * exact.abs().clamp(min=1)
    return bool(((y.double() - exact).abs() <= step).all())


@half
@pytest.mark.parametrize("rows", [16, 1024, 2500])
def test_a_linear_layer_is_computed_in_float32_and_rounded_once(dtype, rows):
    x, W, b = (
        torch.randn(rows, 96).to(dtype),
        torch.randn(40, 96).to(dtype),
        torch.randn(40).to(dtype),
    )
    with Seen() as seen, CpuHalfMatmul(HALF):
        y = functional.linear(x.view(-1, 2, 96), W, b)
    assert y.dtype == dtype and y.shape == (rows // 2, 2, 40)
    assert set(seen.types) == {torch.float32}
    assert near(y.view(rows, 40), x.double() @ W.double().T + b.double())


@half
def test_products_and_attention(dtype):
    a, b = torch.randn(3, 32, 64).to(dtype), torch.randn(3, 64, 48).to(dtype)
    exact = a.double() @ b.double()
    bias = torch.randn(48).to(dtype)
    with Seen() as seen, CpuHalfMatmul(HALF):
        products = [a @ b, torch.matmul(a, b), a.matmul(b), torch.bmm(a, b)]
        added = torch.addmm(bias, a[0], b[0])
        attended = functional.scaled_dot_product_attention(
            a[None], a[None], a[None], is_causal=True
        )
    assert set(seen.types) == {torch.float32}
    assert all(y.dtype == dtype and near(y, exact) for y in products)
    assert near(added, exact[0] + bias.double())
    exact = functional.scaled_dot_product_attention(*[a[None].double()] * 3, is_causal=True)
    assert attended.dtype == dtype and near(attended[0], exact[0])


def test_few_rows_other_types_and_calls_with_out_are_not_changed():
    W = torch.randn(40, 96).bfloat16()
    with Seen() as seen, CpuHalfMatmul(frozenset({torch.bfloat16})):
        functional.linear(torch.randn(2, 96).bfloat16(), W)
        functional.linear(torch.randn(64, 96), W.float())
        functional.linear(torch.randn(64, 96).half(), W.half())
        out = torch.empty(64, 40, dtype=torch.bfloat16)
        torch.mm(torch.randn(64, 96).bfloat16(), W.T, out=out)
    assert seen.types == [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("rows", [0, 1, 8, 9, 100, 1000, 4095, 4096])
def test_inputs_of_an_expert_are_padded_to_few_sizes(rows):
    x, W, b = (torch.randn(*n).bfloat16() for n in ((rows, 96), (40, 96), (40,)))
    sizes = []

    class Sizes(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is functional.linear:
                sizes.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    with Sizes(), CpuHalfMatmul(frozenset()):
        y = functional.linear(x, W, bias=b)
        functional.linear(x[None], W)
    assert near(y, x.double() @ W.double().T + b.double()) and y.shape == (rows, 40)
    assert sizes == [padded_rows(rows), 1]
    assert rows <= padded_rows(rows) <= max(rows + 7, 1.125 * rows)


def test_there_are_few_padded_sizes():
    sizes = {padded_rows(rows) for rows in range(1, 4097)}
    assert len(sizes) < 60
    assert all(padded_rows(size) == size for size in sizes)


@pytest.mark.skipif(
    not has_native_matmul(torch.bfloat16), reason="needs a processor with bfloat16 products"
)
def test_memory_does_not_grow_with_the_numbers_of_tokens():
    """Every shape that oneDNN has seen costs a megabyte, so thousands of them cost gigabytes."""
    grown = {}
    for mode in ("nullcontext()", "cpu_half_matmul()"):
        done = subprocess.run(
            [sys.executable, "-c", GROWTH.format(mode=mode)], capture_output=True, text=True
        )
        grown[mode] = int(done.stdout)
    assert grown["cpu_half_matmul()"] < grown["nullcontext()"] / 4


def test_only_types_without_native_products_are_multiplied_in_float32():
    assert cpu_half_matmul().in_float32 == {dtype for dtype in HALF if not has_native_matmul(dtype)}


def test_it_is_needed_for_half_precision_on_the_cpu_only() -> None:
    half, cpu = [torch.float32, torch.bfloat16], torch.device("cpu")
    assert needs_half_matmul(half, cpu, ragged=True)
    assert needs_half_matmul(half, cpu, ragged=False) == (not has_native_matmul(torch.bfloat16))
    assert not needs_half_matmul([torch.float32], cpu, ragged=True)
    assert not needs_half_matmul(half, torch.device("meta"), ragged=True)
