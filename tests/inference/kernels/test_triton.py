"""The Triton kernel computes with exactly the weights that the file holds.

Without a CUDA device the programs run in Triton's interpreter: slow, but the same programs.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from roundwise.core.quantized_weight import codes_per_block, pack, unpack
from roundwise.errors import ConfigError
from roundwise.inference.kernels.base import PackedWeight
from roundwise.inference.kernels.dispatch import choose_kernel
from roundwise.inference.kernels.reference import ReferenceKernel
from roundwise.inference.kernels.triton import TritonKernel
from tests.inference.kernels.on_device import DEVICE, on_cuda, rows, weight
from tests.inference.kernels.packed import (
    FILE,
    FLOATS,
    assert_same_file,
    layer_of,
)

pytest.importorskip("triton")


def error(y: torch.Tensor, x: torch.Tensor, packed: PackedWeight) -> float:
    """Relative error of y against float64, beyond what its dtype costs to round the true result."""
    true = x.double() @ packed.dequantize(torch.float64)
    rounding = (true.to(y.dtype).double() - true).norm()
    return float(((y.double() - true).norm() - rounding) / true.norm())


@pytest.mark.sampled(5)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [-1, 20, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_multiplies_like_float64(bits: int, group_size: int, act_order: bool) -> None:
    for sym, version in ((True, 1), (False, 0)):
        packed = weight(
            160, 96, bits, group_size, sym=sym, zero_offset=version, act_order=act_order
        )
        kernel = TritonKernel(packed)
        for dtype, count in zip(FLOATS, (3, 16, 1) if sym else (1, 17, 16), strict=True):
            x = rows(count, 160, dtype)
            y = kernel(x)
            assert y.dtype == dtype
            assert y.shape == (count, 96)
            assert error(y, x, packed) < 2e-5


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [17, 33, 64, 130])
def test_multiplies_prompts(dtype: torch.dtype, count: int) -> None:
    packed = weight(128, 160, 4, 64)
    x = rows(count, 128, dtype)
    assert error(TritonKernel(packed)(x), x, packed) < 2e-5


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    group_size=st.sampled_from([-1, 1, 7, 8, 16, 24, 32, 48, 64, 96, 128]),
    blocks=st.integers(1, 9),
    columns=st.integers(1, 4),
    count=st.sampled_from([1, 2, 5, 16, 18]),
    sym=st.booleans(),
    zero_offset=st.integers(0, 1),
    act_order=st.booleans(),
    scales=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
)
def test_any_layer_the_format_allows(
    seed: int, bits: int, group_size: int, blocks: int, columns: int, count: int, sym: bool,
    zero_offset: int, act_order: bool, scales: torch.dtype, dtype: torch.dtype,
) -> None:  # fmt: skip
    least = codes_per_block(bits)
    channels = blocks * least
    packed = weight(
        channels, columns * least, bits, min(group_size, channels), sym=sym,
        zero_offset=zero_offset, act_order=act_order, scales=scales, seed=seed,
    )  # fmt: skip
    kernel = TritonKernel(packed)
    x = rows(count, channels, dtype, seed)
    assert error(kernel(x), x, packed) < 2e-5
    assert_same_file(kernel.packed(), packed)


@pytest.mark.parametrize("stored_g_idx", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_gives_back_the_layout_of_the_file(
    bits: int, zero_offset: int, act_order: bool, stored_g_idx: bool
) -> None:
    packed = weight(
        192, 64, bits, 64, zero_offset=zero_offset, act_order=act_order,
        stored_g_idx=stored_g_idx or act_order,
    )  # fmt: skip
    kernel = TritonKernel(packed)
    assert_same_file(kernel.packed(), packed)
    width = 8 if bits in (5, 6, 7) else bits
    assert kernel.words.shape == (192 * width // 32, 64)  # no more memory
    if bits in (2, 4, 8) and not act_order:
        assert kernel.words is packed.qweight


def test_groups_of_unequal_sizes() -> None:
    packed = weight(96, 64, 4, 32)
    g_idx = torch.cat([torch.full((n,), g, dtype=torch.int32) for g, n in enumerate((64, 3, 29))])
    for order in (torch.arange(96), torch.randperm(96, generator=torch.Generator().manual_seed(0))):
        uneven = PackedWeight(**{**vars(packed), "g_idx": g_idx[order].to(DEVICE)})
        x = rows(2, 96)
        assert error(TritonKernel(uneven)(x), x, uneven) < 2e-5


def test_the_same_bits_every_time() -> None:
    for bits, act_order in ((4, False), (3, True)):
        packed = weight(1024, 64, bits, 128, act_order=act_order)
        x = rows(4, 1024, torch.bfloat16)
        kernel = TritonKernel(packed)
        first = kernel(x)
        for other in (kernel, TritonKernel(packed)):
            assert torch.equal(first.view(torch.int16), other(x).view(torch.int16))


def test_a_row_does_not_depend_on_the_others_while_decoding() -> None:
    kernel = TritonKernel(weight(1024, 64, 4, 128))
    x = rows(16, 1024, torch.float16)
    together = kernel(x)
    for count in (1, 2, 7):
        assert torch.equal(kernel(x[:count]), together[:count])


def test_takes_any_shape_and_strides() -> None:
    kernel = TritonKernel(weight(128, 64, 4, 32))
    wide = rows(6, 256)
    for x in (
        wide[:, :128],
        wide[::2, 128:],
        wide[:, ::2],
        wide[:1, :128].expand(3, 128),
        wide.view(2, 3, 2, 128),
        wide[0, :128],
        wide[:0, :128],
    ):
        y = kernel(x)
        assert y.shape == (*x.shape[:-1], 64)
        flat = kernel(x.reshape(-1, 128).contiguous())
        assert torch.equal(y.reshape(-1, 64), flat)


def test_another_width_of_input_is_refused() -> None:
    with pytest.raises(ValueError, match="x has 120 channels, but the weight has 128"):
        TritonKernel(weight(128, 64, 4, 32))(rows(1, 120))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("group_size", [20, 32])
def test_what_is_not_finite_stays_so(value: float, group_size: int) -> None:
    packed = weight(160, 64, 4, group_size)
    kernel = TritonKernel(packed)
    for dtype in FLOATS:
        x = rows(3, 160, dtype)
        clean = kernel(x)
        x[1, 100] = value
        y = kernel(x)
        assert not y[1].isfinite().any()
        assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_extreme_scales_cost_no_accuracy() -> None:
    packed = weight(64, 64, 8, 32, scales=torch.float32)
    for factor in (1e-30, 1e30):
        far = PackedWeight(**{**vars(packed), "scales": packed.scales * factor})
        x = rows(2, 64)
        assert error(TritonKernel(far)(x), x, far) < 2e-5


def test_a_layer_is_prepared_by_name() -> None:
    packed = weight(128, 96, 4, 32, act_order=True)
    linear = layer_of(packed)
    assert isinstance(linear.prepare("triton"), TritonKernel)
    assert "kernel=triton" in repr(linear)
    x = rows(6, 128).view(2, 3, 128)
    expected = functional.linear(x, packed.dequantize().T, linear.bias)
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)
    saved = linear.state_dict()
    for name in FILE:
        assert torch.equal(saved[name], getattr(packed, name))
    other = layer_of(weight(128, 96, 4, 32, act_order=True, seed=1))
    other.load_state_dict(saved)
    other.prepare("triton")
    assert torch.equal(other(x), linear(x))


def test_copies_compute_the_same() -> None:
    linear = layer_of(weight(64, 64, 3, 32))
    linear.prepare("triton")
    x = rows(2, 64)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert other.kernel.name == "triton"
        assert torch.equal(other(x), linear(x))


def test_gradients_reach_the_input() -> None:
    packed = weight(128, 64, 4, 32, act_order=True)
    linear = layer_of(packed)
    linear.prepare("triton")
    x = rows(3, 128).requires_grad_()
    linear(x).square().sum().backward()
    same = x.detach().clone().requires_grad_()
    functional.linear(same, packed.dequantize().T, linear.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-4, atol=1e-3)


def arguments(kernel: TritonKernel) -> tuple[Any, ...]:
    return (
        kernel.words, kernel.scales, kernel.zeros, kernel.order, kernel.groups, kernel.bits,
        kernel.zero, kernel.group_size,
    )  # fmt: skip


def test_chosen_on_cuda_and_in_the_interpreter_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = weight(64, 64, 4, 32, device="cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_kernel(packed) is not TritonKernel
    assert choose_kernel(packed, "triton") is TritonKernel
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert choose_kernel(packed) is not TritonKernel
    with pytest.raises(ConfigError, match="runs on CUDA devices, but the weight is on cpu"):
        choose_kernel(packed, "triton")
    with pytest.raises(ConfigError, match="not on cpu"):
        torch.ops.roundwise.triton_linear(rows(1, 64).cpu(), *arguments(TritonKernel(packed)))


def test_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundwise.inference.kernels.triton._is_installed", lambda: False)
    packed = weight(64, 64, 4, 32)
    assert choose_kernel(packed) is ReferenceKernel or DEVICE == "cpu"
    with pytest.raises(ConfigError, match=r"triton is not installed: pip install '\.\[tri"):
        choose_kernel(packed, "triton")


def test_packs_on_the_device_of_the_codes() -> None:
    for bits in (2, 3, 4, 5, 6, 7, 8):
        codes = torch.randint(0, 2**bits, (64, 8), dtype=torch.uint8, device=DEVICE)
        words = pack(codes, bits)
        assert words.device == codes.device
        assert torch.equal(unpack(words, bits), codes)


@on_cuda
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("shape", [(4096, 4096), (8192, 2048), (4096, 14336)])
def test_large_layers(shape: tuple[int, int], bits: int, dtype: torch.dtype) -> None:
    packed = weight(*shape, bits, 128)
    kernel = TritonKernel(packed)
    for count in (1, 16, 40, 512):
        x = rows(count, shape[0], dtype)
        assert error(kernel(x), x, packed) < 1e-4


@on_cuda
def test_decodes_faster_than_bfloat16() -> None:
    from triton.testing import do_bench_cudagraph

    packed = weight(8192, 8192, 4, 128, sym=True)
    kernel = TritonKernel(packed)
    dense = packed.dequantize(torch.bfloat16).T.contiguous()
    x = rows(1, 8192, torch.bfloat16)
    quick = do_bench_cudagraph(lambda: kernel(x), return_mode="median")
    slow = do_bench_cudagraph(lambda: functional.linear(x, dense), return_mode="median")
    assert quick < slow
