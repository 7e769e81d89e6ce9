"""Every kernel computes with exactly the weights that the file stands for, and gives them back."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundwise.core.backends import cpp
from roundwise.core.quantized_weight import WIDTHS, codes_per_block, pack
from roundwise.errors import ConfigError
from roundwise.inference.kernels import dispatch
from roundwise.inference.kernels.base import PackedWeight
from roundwise.inference.kernels.cpp import NativeKernel
from roundwise.inference.kernels.reference import ReferenceKernel
from roundwise.inference.quant_linear import QuantLinear

module, status = cpp.load()
needs_native = pytest.mark.skipif(
    module is None, reason=f"needs the native extension: {status.reason}"
)
SETS = module.instruction_sets() if module is not None else []

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def weight_of(
    seed: int, bits: int, in_features: int, out_features: int, group_size: int, *,
    sym: bool = True, act_order: bool = False, stored_g_idx: bool = True, zero_offset: int = 1,
    scales: torch.dtype = torch.float16,
) -> PackedWeight:  # fmt: skip
    """A packed weight of random codes, scales of both signs, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group_size)
    codes = torch.randint(0, 2**bits, (in_features, out_features), generator=generator)
    zeros = torch.full((groups, out_features), 2 ** (bits - 1))
    if not sym:
        zeros = torch.randint(0, 2**bits, zeros.shape, generator=generator)
    sizes = torch.rand(groups, out_features, generator=generator) * 0.01 + 0.001
    sizes *= torch.where(torch.rand(sizes.shape, generator=generator) < 0.2, -1, 1)
    g_idx = torch.arange(in_features) // group_size
    if act_order:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    stored = ((zeros - zero_offset) & (2**bits - 1)).T.contiguous()
    return PackedWeight(
        pack(codes, bits), pack(stored, bits).T.contiguous(), sizes.to(scales),
        g_idx.to(torch.int32) if stored_g_idx or act_order else None, bits, zero_offset,
    )  # fmt: skip


def right(y: torch.Tensor, x: torch.Tensor, weight: PackedWeight, within: float = 1e-4) -> bool:
    """Within 1e-4 of float64, relative, and half a unit in the last place of the answer's dtype.

    Relative to the size of the terms: they may cancel, and nobody is right about what is left of it.
    """
    W = weight.dequantize(torch.float64)
    assert y.shape == (len(x), W.shape[1])
    assert y.dtype == x.dtype
    exact = x.double() @ W
    size = (x.double().square() @ W.square()).sum().sqrt()
    off = (y.double() - exact).norm()
    kind = torch.finfo(y.dtype)
    least = (
        kind.smallest_normal * kind.eps / 2 * y.numel() ** 0.5
    )  # half of what subnormals tell apart
    return bool(off <= within * size + kind.eps / 2 * exact.norm() + least)


@pytest.fixture(params=SETS or [pytest.param("", marks=needs_native)])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    module.use(request.param)
    yield request.param
    module.use(SETS[0])


@needs_native
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
def test_every_case(bits: int, sym: bool, act_order: bool, instruction_set: str) -> None:
    for (in_features, out_features), group_size, dtype in itertools.product(
        [(128, 64), (96, 32), (1056, 160)], [8, 32, 48, 128, 1056], FLOATS
    ):
        weight = weight_of(
            in_features, bits, in_features, out_features, min(group_size, in_features),
            sym=sym, act_order=act_order,
        )  # fmt: skip
        kernel = NativeKernel(weight)
        for rows in (1, 2, 4, 7):
            x = torch.randn(rows, in_features).to(dtype)
            assert right(kernel(x), x, weight), (in_features, group_size, rows)


@needs_native
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from(WIDTHS),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 12)),
    group_size=st.integers(1, 300),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    zero_offset=st.integers(0, 1),
    scales=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    rows=st.integers(0, 14),
    dtype=st.sampled_from(FLOATS),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 300.0]),
)
def test_any_case(
    seed: int, bits: int, shape: tuple[int, int], group_size: int, flags: tuple[bool, bool, bool],
    zero_offset: int, scales: torch.dtype, rows: int, dtype: torch.dtype, size: float,
) -> None:  # fmt: skip
    block = codes_per_block(bits)
    sym, act_order, stored = flags
    weight = weight_of(
        seed, bits, shape[0] * block, shape[1] * block, min(group_size, shape[0] * block),
        sym=sym, act_order=act_order, stored_g_idx=stored, zero_offset=zero_offset, scales=scales,
    )  # fmt: skip
    kernel = NativeKernel(weight)
    given_back = kernel.packed()
    for name in ("qweight", "qzeros", "scales"):
        assert torch.equal(getattr(given_back, name), getattr(weight, name)), name
        assert getattr(given_back, name).dtype == getattr(weight, name).dtype
    assert given_back.g_idx is weight.g_idx
    if dtype == torch.float16 and size < 1e-3:
        size = 1.0  # below what float16 can say
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, weight.in_features, generator=generator) * size).to(dtype)
    y = kernel(x)
    if size == 1e-30:
        assert bool((y.abs() < 1e-27).all())
    else:
        assert right(y, x, weight)


@needs_native
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_depends_on_nothing_else(bits: int, instruction_set: str) -> None:
    """Neither on the other rows, nor on their number, nor on the number of threads."""
    kernel = NativeKernel(weight_of(0, bits, 512, 192, 128, sym=False))
    x = torch.randn(1000, 512)
    together, threads = kernel(x), torch.get_num_threads()
    for start, count in [(0, 1), (1, 2), (3, 3), (6, 5), (500, 400), (999, 1)]:
        assert torch.equal(kernel(x[start : start + count]), together[start : start + count])
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert torch.equal(kernel(x), together)
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_outliers_cost_no_more_than_their_share() -> None:
    """They make the integers of their run coarse, and nobody else's."""
    weight = weight_of(1, 4, 512, 64, 128)
    x = torch.randn(4, 512)
    x[:, 7] = 1000
    assert right(NativeKernel(weight)(x), x, weight, within=2e-4)
    others, beyond = x.clone(), weight_of(1, 4, 512, 64, 128)
    beyond.scales[0] = 0
    others[:, 7] = 1
    kernel = NativeKernel(beyond)
    assert torch.equal(kernel(x), kernel(others))


@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_stays_so(value: float, dtype: torch.dtype) -> None:
    kernel = NativeKernel(weight_of(2, 4, 256, 64, 128))
    x = torch.randn(3, 256).to(dtype)
    clean = kernel(x)
    x[1, 200] = value
    y = kernel(x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_answers_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """One input channel of code 1, zero 0 and scale 4: y is 4 x, infinite where that is too large."""
    codes = torch.zeros(8, 8, dtype=torch.int64)
    codes[0] = 1
    weight = PackedWeight(
        pack(codes, 4), torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 8), 4.0), None, 4, 0
    )
    values = torch.cat(
        [torch.logspace(-8, 4.8, 300), torch.tensor([16376.0, 16380.0, 16384.0, 0.0])]
    )
    x = torch.zeros(len(values), 8)
    x[:, 0] = values
    x = x.to(dtype)
    expected = (x[:, 0].double() * 4).to(dtype)
    assert torch.equal(NativeKernel(weight)(x)[:, 0], expected)
    assert torch.equal(NativeKernel(weight)(-x)[:, 0], -expected)


@needs_native
def test_takes_any_strides() -> None:
    weight = weight_of(3, 4, 128, 64, 64)
    kernel, x = NativeKernel(weight), torch.randn(128, 6)
    assert torch.equal(kernel(x.T), kernel(x.T.contiguous()))
    assert torch.equal(kernel(x.T[::2]), kernel(x.T.contiguous()[::2]))


@needs_native
def test_another_width_of_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"roundwise\._native: x"):
        NativeKernel(weight_of(4, 4, 128, 64, 64))(torch.randn(1, 120))


def linear_of(weight: PackedWeight, bias: bool = True) -> QuantLinear:
    linear = QuantLinear(
        weight.in_features, weight.out_features, bits=weight.bits, groups=weight.groups, bias=bias,
        stored_g_idx=weight.g_idx is not None, zero_offset=weight.zero_offset, dtype=torch.float32,
    )  # fmt: skip
    tensors = {name: getattr(weight, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    if bias:
        tensors["bias"] = torch.randn(weight.out_features)
    linear.load_state_dict({name: t for name, t in tensors.items() if t is not None})
    return linear


@pytest.mark.parametrize("kernel", [k.name for k in dispatch.KERNELS])
class TestAsALayer:
    """QuantLinear with each kernel."""

    @pytest.fixture
    def linear(self, kernel: str) -> QuantLinear:
        weight = weight_of(5, 3, 96, 64, 32, sym=False, act_order=True)
        reason = dispatch.choose(weight, "reference") and next(
            k.why_not(weight) for k in dispatch.KERNELS if k.name == kernel
        )
        if reason is not None:
            pytest.skip(f"needs what {kernel} needs: {reason}")
        linear = linear_of(weight)
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
        weight = weight_of(5, 3, 96, 64, 32, sym=False, act_order=True)
        state = linear.state_dict()
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            assert torch.equal(state[name], getattr(weight, name))
        other = linear_of(weight_of(6, 3, 96, 64, 32, sym=False, act_order=True))
        other(torch.zeros(1, 96))
        other.load_state_dict(state)
        x = torch.randn(2, 96)
        other.prepare(linear.kernel.name)
        assert torch.equal(other(x), linear(x))

    def test_copies_compute_the_same(self, linear: QuantLinear) -> None:
        x = torch.randn(3, 96)
        before = linear(x)
        for reference in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
            assert torch.equal(reference(x), before)

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


@needs_native
def test_the_operator_keeps_torchs_rules() -> None:
    kernel = NativeKernel(weight_of(7, 4, 128, 64, 64))
    arguments = (torch.randn(2, 128), *kernel._tensors(), *kernel._numbers())
    torch.library.opcheck(torch.ops.roundwise.native_linear.default, arguments)


class TestDispatch:
    """Who computes what, and who may say so."""

    WEIGHT = weight_of(8, 4, 128, 64, 64)

    @needs_native
    def test_native_on_the_cpu(self) -> None:
        assert dispatch.choose(self.WEIGHT) is NativeKernel

    def test_reference_without_the_extension(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpp, "load", lambda: (None, cpp.Status(None, "not built")))
        assert dispatch.choose(self.WEIGHT) is ReferenceKernel
        with pytest.raises(ConfigError, match=r"native cannot compute this layer: .* not built"):
            dispatch.choose(self.WEIGHT, "native")

    def test_by_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ROUNDWISE_KERNEL", "reference")
        assert dispatch.choose(self.WEIGHT) is ReferenceKernel

    def test_an_unknown_name(self) -> None:
        with pytest.raises(ConfigError, match=r"no kernel is called 'fast': there are .*reference"):
            dispatch.choose(self.WEIGHT, "fast")

    def test_elsewhere(self) -> None:
        away = PackedWeight(
            *(t.to("meta") for t in (self.WEIGHT.qweight, self.WEIGHT.qzeros, self.WEIGHT.scales)),
            None, 4, 1,
        )  # fmt: skip
        assert "not on meta" in str(NativeKernel.why_not(away))
