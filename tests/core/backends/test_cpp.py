"""The C++ extension gives the codes of plain torch, with every instruction set of this processor."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundwise import QuantizeConfig, QuantizedWeight, solve
from roundwise.core.backends import cpp
from roundwise.core.quantized_weight import codes_per_block, pack
from roundwise.errors import NumericalError
from tests.core.native import SETS, module, needs_native, using
from tests.core.problems import layer


def solved(name: str | None, *args: Any, **kwargs: Any) -> QuantizedWeight:
    with using(name):
        return solve(*args, **kwargs)


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Equal weights. Codes may differ where grids are equal: flipped, or shifted by a code."""
    return torch.equal(one.g_idx, other.g_idx) and torch.equal(one.dequantize(), other.dequantize())


SETTINGS = [
    {"positive_scales": True},
    {"recipe": "textbook"},
    {"recipe": "textbook", "order": "static"},
    {"grid": "mse", "grid_candidates": 1, "refine": 0},
    {"grid_candidates": 3, "refine": 0},
    {"refine": 2, "exchange": 1},
    {},
    {"refine": 2, "exchange": 3},
    {"order": "static"},
    {"desc_act": True},
    {"group_size": -1},
]


@pytest.mark.sampled(5)
@needs_native
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_codes_equal_those_of_torch(bits: int, sym: bool, config: dict[str, Any]) -> None:
    """In float64, where no rounding tie is near enough for the order of summation to matter."""
    W, H = layer(bits, rows=37, width=192)
    settings = QuantizeConfig(**{"bits": bits, "sym": sym, "group_size": 64, **config})
    expected = solved(None, W, H, settings)
    for name in SETS:
        assert same(solved(name, W, H, settings), expected), name


@needs_native
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40), groups=st.integers(1, 4), size=st.sampled_from([8, 24, 56]),
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]), sym=st.booleans(), keep=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_any_shape(
    rows: int, groups: int, size: int, bits: int, sym: bool, keep: int, seed: int
) -> None:
    W, H = layer(seed, rows, groups * size)
    config = QuantizeConfig(bits=bits, sym=sym, group_size=size, grid_candidates=keep)
    assert same(solved(SETS[0], W, H, config), solved(None, W, H, config))


@needs_native
@pytest.mark.parametrize("name", SETS)
def test_float32_loses_nothing(name: str) -> None:
    """Ties may fall otherwise in float32; the error is the same."""
    W, H = layer(5, rows=64, width=512)
    config = QuantizeConfig(bits=3)
    ours, torchs = (solved(who, W.float(), H.float(), config) for who in (name, None))
    assert ours.relative_error == pytest.approx(torchs.relative_error, rel=2e-3)
    assert (ours.codes == torchs.codes).float().mean() > 0.99


@needs_native
def test_threads_do_not_matter() -> None:
    W, H = layer(6, rows=100, width=128)
    threads = torch.get_num_threads()
    solutions = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            solutions.append(solve(W, H))
    finally:
        torch.set_num_threads(threads)
    assert same(solutions[0], solutions[1])
    assert same(solutions[0], solutions[2])


@needs_native
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_packs_like_torch(bits: int, rows: int) -> None:
    codes = torch.randint(0, 2**bits, (3 * codes_per_block(bits), rows)).to(torch.uint8)
    with using(None):
        expected = pack(codes, bits)
    assert torch.equal(pack(codes, bits), expected)


@needs_native
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "m", "n"), [(1, 1, 1), (7, 5, 70), (300, 37, 129), (513, 200, 64), (1030, 96, 96)]
)
def test_native_sums_equal_the_plain_product(
    name: str, dtype: torch.dtype, tokens: int, m: int, n: int
) -> None:
    with using(name):
        if cpp.product_dtype(dtype) is None:
            pytest.skip(f"needs an instruction for {dtype} in {name}")
        generator = torch.Generator().manual_seed(tokens)
        A, B = (torch.randn(tokens, k, generator=generator).to(dtype) for k in (m, n))
        C = torch.ones(m, n)
        cpp.add_moment(C, A, B, lower=False)
        torch.testing.assert_close(C.double(), A.double().T @ B.double() + 1, rtol=1e-5, atol=1e-4)
        H = torch.zeros(m, m)
        cpp.add_moment(H, A, A, lower=True)
        exact = A.double().T @ A.double()
        torch.testing.assert_close(H.tril().double(), exact.tril(), rtol=1e-5, atol=1e-4)


@needs_native
@pytest.mark.parametrize("name", [*SETS, None])
@pytest.mark.parametrize("sym", [True, False])
def test_a_scale_too_large_for_float16_is_an_error(name: str | None, sym: bool) -> None:
    W, H = layer(7, rows=3, width=64)
    W[1] *= 1e9
    with pytest.raises(NumericalError, match="float16"):
        solved(name, W, H, QuantizeConfig(sym=sym))


@needs_native
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("size", [1e-9, 3e-6, 1.0, 1e3])
def test_scales_are_rounded_as_torch_does(name: str, size: float) -> None:
    """Also where float16 is subnormal, and where it can only be its smallest value."""
    W, H = layer(8, rows=64, width=64)
    W *= size / W.abs().amax(dim=1, keepdim=True)
    config = QuantizeConfig(recipe="textbook", group_size=32)
    assert torch.equal(solved(name, W, H, config).scales, solved(None, W, H, config).scales)


@needs_native
def test_wrong_arrays_are_refused() -> None:
    D = torch.ones(8)
    with pytest.raises(ValueError, match=r"target|asked|U"):
        module.group(
            torch.eye(8), D, torch.zeros(8, 4), torch.zeros(7, 4), False, D, D, 1, 15, 0, True, True,
            torch.zeros(4), torch.zeros(4), torch.zeros(4), torch.zeros(8, 4, dtype=torch.uint8),
            torch.zeros(8, 4), 1,
        )  # fmt: skip
    with pytest.raises(ValueError, match="grid"):
        module.known(
            torch.eye(8), D, torch.zeros(8, 4), torch.zeros(8, 4), torch.ones(1, 4),
            torch.ones(1, 4), torch.full((8,), 1), 15, torch.zeros(4),
            torch.zeros(8, 4, dtype=torch.uint8), torch.zeros(8, 4), 1,
        )  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("value", "expected"),
    [("off", "switched off"), ("pentium", "this processor has"), *[(name, name) for name in SETS]],
)
def test_the_environment_chooses(value: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from roundwise.core.backends import cpp; print(cpp.load()[1])"],
        env={**os.environ, cpp.VARIABLE: value}, capture_output=True, text=True,
    )  # fmt: skip
    if value == "pentium" and importlib.util.find_spec("roundwise._native") is None:
        expected = "the extension is missing"
    assert expected in done.stdout + done.stderr
