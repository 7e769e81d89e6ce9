"""The C++ kernel computes with exactly the weights that the file holds, and gives them back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundwise.core.backends import cpp
from roundwise.core.quantized_weight import WIDTHS, codes_per_block, pack, unpack
from roundwise.inference.kernels.base import PackedWeight
from roundwise.inference.kernels.cpp import (
    NativeKernel,
    activation_order,
    column_layout,
    join_tiles,
    pack_tiles,
    unpack_tiles,
)
from tests.inference.kernels.packed import FLOATS, assert_same_file, random_weight

module, status = cpp.load()
needs_native = pytest.mark.skipif(
    module is None, reason=f"needs the native extension: {status.reason}"
)
SETS = module.instruction_sets() if module is not None else []


def right(y: torch.Tensor, x: torch.Tensor, weight: PackedWeight, within: float = 1e-4) -> bool:
    """Tells whether y is within 1e-4 of float64, relative, and half a unit in the last place.

    Relative to the size of the terms of the sums: if they cancel, rounding errors are all that is left.
    """
    W = weight.dequantize(torch.float64)
    assert y.shape == (len(x), W.shape[1])
    assert y.dtype == x.dtype
    exact = x.double() @ W
    size = (x.double().square() @ W.square()).sum().sqrt()
    off = (y.double() - exact).norm()
    kind = torch.finfo(y.dtype)
    least = kind.smallest_normal * kind.eps / 2 * y.numel() ** 0.5  # half a step of subnormals
    return bool(off <= within * size + kind.eps / 2 * exact.norm() + least)


@pytest.fixture(params=SETS or [pytest.param("", marks=needs_native)])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    module.use(request.param)
    yield request.param
    module.use(SETS[0])


@pytest.mark.sampled(5)
@needs_native
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
def test_every_case(bits: int, sym: bool, act_order: bool, instruction_set: str) -> None:
    for (in_features, out_features), group_size, dtype in itertools.product(
        [(128, 64), (96, 32), (1056, 160)], [8, 32, 48, 128, 1056], FLOATS
    ):
        weight = random_weight(
            bits, in_features, out_features, group_size, seed=in_features, sym=sym,
            act_order=act_order,
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
    weight = random_weight(
        bits, shape[0] * block, shape[1] * block, group_size, seed=seed,
        sym=sym, act_order=act_order, stored_g_idx=stored, zero_offset=zero_offset, scales=scales,
    )  # fmt: skip
    kernel = NativeKernel(weight)
    assert_same_file(kernel.packed(), weight)
    if dtype == torch.float16 and size < 1e-3:
        size = 1.0  # too small for float16
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
    kernel = NativeKernel(random_weight(bits, 512, 192, 128, seed=0, sym=False))
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
def test_outliers_affect_only_their_run() -> None:
    """An outlier makes the integers of its run coarser, but not those of other runs."""
    weight = random_weight(4, 512, 64, 128, seed=1)
    x = torch.randn(4, 512)
    x[:, 7] = 1000
    assert right(NativeKernel(weight)(x), x, weight, within=2e-4)
    others, beyond = x.clone(), random_weight(4, 512, 64, 128, seed=1)
    beyond.scales[0] = 0
    others[:, 7] = 1
    kernel = NativeKernel(beyond)
    assert torch.equal(kernel(x), kernel(others))


@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_stays_so(value: float, dtype: torch.dtype) -> None:
    kernel = NativeKernel(random_weight(4, 256, 64, 128, seed=2))
    x = torch.randn(3, 256).to(dtype)
    clean = kernel(x)
    x[1, 200] = value
    y = kernel(x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
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
def test_any_strides() -> None:
    weight = random_weight(4, 128, 64, 64, seed=3)
    kernel, x = NativeKernel(weight), torch.randn(128, 6)
    assert torch.equal(kernel(x.T), kernel(x.T.contiguous()))
    assert torch.equal(kernel(x.T[::2]), kernel(x.T.contiguous()[::2]))


@needs_native
def test_another_width_of_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"roundwise\._native: x"):
        NativeKernel(random_weight(4, 128, 64, 64, seed=4))(torch.randn(1, 120))


@needs_native
def test_the_operator_obeys_torchs_rules() -> None:
    kernel = NativeKernel(random_weight(4, 128, 64, 64, seed=7))
    arguments = (torch.randn(2, 128), *kernel.operator_tensors(), *kernel.operator_integers())
    torch.library.opcheck(torch.ops.roundwise.native_linear.default, arguments)


def test_columns_stay_in_the_order_of_the_file_if_groups_fill_words() -> None:
    layout = column_layout(random_weight(4, 192, 8, 64))
    assert layout.is_file_order
    assert layout.file_columns.tolist() == list(range(192))
    assert layout.runs.tolist() == [[64, 0], [64, 1], [64, 2]]
    assert column_layout(random_weight(4, 320, 8, 320)).runs.tolist() == [
        [128, 0],
        [128, 0],
        [64, 0],
    ]


def test_columns_are_sorted_by_group_and_padded_to_whole_words() -> None:
    """Groups of 5 columns at 8 bits: a word has 4 codes, so each group is padded to 8 columns."""
    weight = random_weight(8, 12, 4, 5)
    g_idx = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 2, 2], dtype=torch.int32)
    layout = column_layout(PackedWeight(**{**vars(weight), "g_idx": g_idx}))
    pad = 12
    assert not layout.is_file_order
    assert layout.file_columns.tolist() == [
        0, 2, 4, 6, 8, pad, pad, pad, 1, 3, 5, 7, 9, pad, pad, pad, 10, 11, pad, pad,
    ]  # fmt: skip
    assert layout.runs.tolist() == [[8, 0], [8, 1], [4, 2]]


@pytest.mark.parametrize(
    ("bits", "first"),
    [
        (2, [0, 8, 1, 9, 2, 10]),
        (3, [0, 8, 1, 9, 2, 10]),
        (4, [0, 4, 1, 5, 2, 6, 3, 7]),
        (8, [0, 2, 1, 3, 4, 6, 5, 7]),
    ],
)
def test_activations_are_in_the_order_of_pairs(bits: int, first: list[int]) -> None:
    layout = column_layout(random_weight(bits, 64, 32, 64))
    order = activation_order(layout, bits)
    assert order[: len(first)].tolist() == first
    assert sorted(order.tolist()) == list(range(64))


def test_three_bit_words_are_as_documented() -> None:
    """Every code by itself: its two low bits in one word, its high bit in the third one."""
    for column in range(32):
        codes = torch.zeros(32, 64, dtype=torch.int64)
        codes[column] = 0b110
        weight = PackedWeight(
            pack(codes, 3), torch.zeros(1, 6, dtype=torch.int32), torch.ones(1, 64), None, 3, 0
        )
        [words] = (pack_tiles(weight, column_layout(weight)).long() & 0xFFFFFFFF)[:, :, 0].tolist()
        half, c = divmod(column, 16)
        high = 8 * half + (2 * (c % 8) if c % 8 < 4 else 2 * (c % 8 - 4) + 1) + 16 * (c // 8)
        expected = [0, 0, 1 << high]
        expected[half] = 0b10 << 2 * c
        assert words == expected, column


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("act_order", [False, True])
def test_tiles_hold_the_codes(bits: int, act_order: bool) -> None:
    """96 output channels are two tiles, the second one half full."""
    weight = random_weight(bits, 64, 96, 32, act_order=act_order)
    layout = column_layout(weight)
    tiles = pack_tiles(weight, layout)
    width = 8 if bits in (5, 6, 7) else bits
    assert tiles.shape == (2, len(layout.file_columns) * width // 32, 64)
    assert torch.equal(unpack_tiles(tiles, 96, layout, bits), weight.qweight)
    if bits != 3:
        codes = unpack(join_tiles(tiles, 96), width)
        assert torch.equal(codes, unpack(weight.qweight, bits)[layout.file_columns])
