"""QuantLinear computes with exactly the weights that core says a file stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import roundwise as rw
from roundwise.checkpoint.gptq_format import encode
from roundwise.errors import ConfigError
from roundwise.inference.quant_linear import QuantLinear

IN, OUT = 96, 64


def layer(seed: int, stored_g_idx: bool = True, bias: bool = True, **options: Any) -> Any:
    """A quantized weight and the QuantLinear that holds it."""
    generator = torch.Generator().manual_seed(seed)
    config = rw.QuantizeConfig(**{"group_size": 32, **options})
    W = torch.randn(OUT, IN, generator=generator)
    X = torch.randn(4 * IN, IN, generator=generator) * torch.rand(IN, generator=generator)
    q = rw.solve(W, X.T @ X / len(X), config)
    linear = QuantLinear(
        IN, OUT, bits=config.bits, groups=q.scales.shape[1], bias=bias, stored_g_idx=stored_g_idx,
        zero_offset=int(config.format == "gptq"), dtype=torch.float32,
    )  # fmt: skip
    tensors = encode(q, config)
    if not stored_g_idx:
        del tensors["g_idx"]
    if bias:
        tensors["bias"] = torch.randn(OUT, generator=generator)
    linear.load_state_dict(tensors)
    return q, linear


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    version=st.sampled_from(["gptq", "gptq_v2"]),
    group_size=st.sampled_from([-1, 8, 16, 32, 96]),
    desc_act=st.booleans(),
)
def test_dequantizes_as_core_does(
    seed: int, bits: int, sym: bool, version: str, group_size: int, desc_act: bool
) -> None:
    q, linear = layer(
        seed, bits=bits, sym=sym, format=version, group_size=group_size, desc_act=desc_act
    )
    assert torch.equal(linear.dequantize().T, q.dequantize())


def test_forward_is_a_linear_layer() -> None:
    q, linear = layer(0)
    x = torch.randn(2, 5, IN)
    torch.testing.assert_close(
        linear(x), functional.linear(x, q.dequantize(), linear.bias), rtol=1e-3, atol=1e-3
    )


def test_without_bias_and_without_g_idx() -> None:
    q, linear = layer(1, stored_g_idx=False, bias=False)
    assert linear.g_idx is None
    x = torch.randn(3, IN)
    torch.testing.assert_close(linear(x), x @ q.dequantize().T, rtol=1e-3, atol=1e-3)
    assert set(linear.state_dict()) == {"qweight", "qzeros", "scales"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_answers_in_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    q, linear = layer(2)
    x = torch.randn(4, IN).to(dtype)
    assert linear(x).dtype == dtype
    expected = functional.linear(x.double(), q.dequantize().double(), linear.bias.double())
    worst = {torch.float16: 0.1, torch.bfloat16: 0.7, torch.float64: 1e-5}[dtype]
    assert (linear(x).double() - expected).abs().max() < worst


def test_gradients_reach_the_input() -> None:
    q, linear = layer(3)
    x = torch.randn(4, IN, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(4, IN), rtol=1e-5, atol=1e-5)


def test_other_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match="bits=5"):
        QuantLinear(IN, OUT, bits=5, groups=3, bias=False)


def test_says_what_it_is() -> None:
    text = repr(layer(4)[1])
    for part in ("in_features=96", "out_features=64", "bits=4", "groups=3", "bias=True"):
        assert part in text
