"""QuantLinear computes with exactly the weights that core puts into the file, with every kernel."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import roundwise as rw
from roundwise.checkpoint.gptq_format import encode
from roundwise.errors import ConfigError
from roundwise.inference.kernels.dispatch import KERNELS
from roundwise.inference.quant_linear import QuantLinear
from tests.inference.kernels.packed import FILE, layer_of, random_weight

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
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
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
def test_returns_the_dtype_of_its_input(dtype: torch.dtype) -> None:
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
    with pytest.raises(ConfigError, match="bits=9"):
        QuantLinear(IN, OUT, bits=9, groups=3, bias=False)


def test_repr_names_sizes_and_kernel() -> None:
    linear = layer(4)[1]
    sizes = "in_features=96, out_features=64, bits=4, groups=3, bias=True"
    assert repr(linear) == f"QuantLinear({sizes}, kernel=not chosen yet)"
    linear.prepare("reference")
    assert repr(linear) == f"QuantLinear({sizes}, kernel=reference)"


@pytest.mark.parametrize("kernel", [k.name for k in KERNELS])
class TestEachKernel:
    """QuantLinear with each kernel."""

    @pytest.fixture
    def linear(self, kernel: str) -> QuantLinear:
        weight = random_weight(3, 96, 64, 32, sym=False, act_order=True)
        [cls] = [k for k in KERNELS if k.name == kernel]
        reason = cls.unsupported_reason(weight)
        if reason is not None:
            pytest.skip(f"the kernel {kernel} is not available: {reason}")
        linear = layer_of(weight)
        linear.prepare(kernel)
        assert f"kernel={kernel}" in repr(linear)
        return linear

    def test_there_is_one_copy(self, linear: QuantLinear) -> None:
        assert linear.qweight is None
        assert linear.qzeros is None

    def test_asking_for_the_weights_dtype_costs_nothing(
        self, linear: QuantLinear, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(type(linear.kernel), "packed", None)
        assert linear.weight.dtype == torch.float32
        assert linear.weight.device.type == "cpu"

    def test_state_dict_is_that_of_the_file(self, linear: QuantLinear) -> None:
        weight = random_weight(3, 96, 64, 32, sym=False, act_order=True)
        state = linear.state_dict()
        for name in FILE:
            assert torch.equal(state[name], getattr(weight, name))
        other = layer_of(random_weight(3, 96, 64, 32, seed=1, sym=False, act_order=True))
        other(torch.zeros(1, 96))
        other.load_state_dict(state)
        x = torch.randn(2, 96)
        other.prepare(linear.kernel.name)
        assert torch.equal(other(x), linear(x))

    def test_copies_compute_the_same(self, linear: QuantLinear) -> None:
        x = torch.randn(3, 96)
        before = linear(x)
        for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
            assert torch.equal(other(x), before)

    def test_other_dtypes_of_the_module(self, linear: QuantLinear, kernel: str) -> None:
        x = torch.randn(3, 96)
        before = linear(x)
        linear.to(torch.bfloat16)
        assert linear.kernel is None
        linear.prepare(kernel)
        torch.testing.assert_close(linear(x), before, rtol=0.02, atol=0.02)

    def test_gradients(self, linear: QuantLinear) -> None:
        x = torch.randn(4, 96, requires_grad=True)
        linear(x).sum().backward()
        expected = linear.dequantize().sum(1).expand(4, 96)
        torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)

    def test_compiles_without_a_break(self, linear: QuantLinear) -> None:
        x = torch.randn(2, 3, 96)
        with torch.no_grad():
            compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), linear(x))
