"""Large unquantized layers: the same product, computed by the C++ extension."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import roundwise as rw
from roundwise.inference.cpu import streamed_linear
from roundwise.inference.cpu.streamed_linear import StreamedLinear
from tests.inference.kernels.test_cpp import instruction_set, module, needs_native

__all__ = ["instruction_set"]
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def made(
    dtype: torch.dtype, bias: bool = False, shape: tuple[int, int] = (96, 37)
) -> StreamedLinear:
    layer = nn.Linear(*shape, bias=bias, dtype=dtype).requires_grad_(False)
    layer.__class__ = StreamedLinear
    return layer


@needs_native
@HALVES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 96), (2, 96), (1, 2, 96), (96,), (3, 96), (0, 96)])
def test_products(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...], instruction_set: str
) -> None:
    layer, x = made(dtype, bias), torch.randn(shape).to(dtype)
    exact = nn.functional.linear(x.double(), layer.weight.double())
    if layer.bias is not None:
        exact = exact + layer.bias.double()
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)
    if y.numel():
        off = (y.double() - exact).norm() / exact.norm()
        assert off < torch.finfo(dtype).eps * (1 if bias else 0.5)


@needs_native
@HALVES
def test_it_calls_the_extension(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    dense = module.dense
    monkeypatch.setattr(module, "dense", lambda *a: (calls.append(a[3]), dense(*a)))
    layer = made(dtype)
    for rows in (1, 2, 3):
        layer(torch.randn(rows, 96).to(dtype))
    layer(torch.randn(1, 96).to(dtype).requires_grad_(True))
    assert calls == [1, 2]


@needs_native
def test_nan() -> None:
    layer, x = made(torch.bfloat16), torch.randn(1, 96).bfloat16()
    x[0, 5] = float("nan")
    assert layer(x).isnan().all()


@needs_native
def test_large_layers_of_a_quantized_model(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_linear, "LARGE", 1)
    model, _ = rw.load(quantized("llama"), dtype=torch.bfloat16)
    assert isinstance(model.lm_head, StreamedLinear)
    x = torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        one = model(x, logits_to_keep=1).logits
        monkeypatch.setattr(streamed_linear, "MAX_ROWS", 0)
        torch.testing.assert_close(model(x, logits_to_keep=1).logits, one, rtol=0.02, atol=0.02)
    assert "lm_head.weight" in model.state_dict()


def test_float32_layers_are_not_replaced(quantized: Callable[..., Path]) -> None:
    model, _ = rw.load(quantized("llama"), dtype=torch.float32)
    assert type(model.lm_head) is nn.Linear
