"""The Triton programs by themselves: exact integers, sums in order, machine code for a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from roundwise.core.quantized_weight import WIDTHS, unpack
from roundwise.inference.kernels.base import PackedWeight
from roundwise.inference.kernels.triton import TritonKernel
from tests.hopper import compiles
from tests.inference.kernels.packed import FLOATS, random_weight

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_minus_zero_points_are_exact(bits: int, dtype: torch.dtype) -> None:
    """With scales of 1 and an identity for x, a product is the integers themselves."""
    weight = random_weight(bits, 64, 64, 32, sym=False, device=DEVICE)
    weight = PackedWeight(**{**vars(weight), "scales": torch.ones_like(weight.scales)})
    codes = unpack(weight.qweight, bits).to(torch.int32)
    expected = codes - weight.zeros().repeat_interleave(32, dim=0)
    y = TritonKernel(weight)(torch.eye(64, dtype=dtype, device=DEVICE))
    assert torch.equal(y.to(torch.int32), expected)


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_partial_sums_are_added_in_order(splits: int) -> None:
    from roundwise.inference.kernels.triton_kernels import sum_splits

    parts = torch.randn(splits, 1500, device=DEVICE) * 10.0 ** torch.arange(splits)[:, None].to(
        DEVICE
    )
    y = torch.empty(1500, device=DEVICE)
    sum_splits[(2,)](parts, y, 1500, SPLITS=splits, BLOCK=1024, num_warps=4)
    expected = torch.zeros(1500, device=DEVICE)
    for part in parts:
        expected += part
    assert torch.equal(y, expected)


COMPILED = """
import roundwise.inference.kernels.triton_kernels as programs
from roundwise.inference.kernels.triton_launch import DeviceLimits, choose_tiling

def aligned(name):
    return name.endswith("_ptr") or name in ("N", "K", "x_stride")

scalars = dict.fromkeys(
    "M N K x_stride tiles_per_group tiles_per_split magic size".split(), "i32")
pointers = dict(words_ptr="*i32", scales_ptr="*fp16", zeros_ptr="*u8", groups_ptr="*i32")
for x, size, bits, count, run in (
    ("*bf16", 2, 4, 1, 128), ("*fp16", 2, 3, 512, 32), ("*fp32", 4, 8, 64, 128), ("*bf16", 2, 2, 1, 0)
):
    tiling = choose_tiling(count, 4096, run, bits, size, DeviceLimits(132, 232448))
    built = build(
        programs.matmul_tiles, {**scalars, **pointers, "x_ptr": x, "y_ptr": x},
        dict(BITS=bits, ZERO=-1 if run == 32 else 2, SCATTERED=run == 0, BM=tiling.BM, BN=tiling.BN,
             BK=tiling.BK, STAGES=tiling.stages), tiling.warps, aligned)
    assert "wgmma" in built.asm["ptx"], "no tensor cores"
    if run:
        assert built.metadata.shared <= tiling.shared_memory(bits, size), (built.metadata.shared, tiling)
build(programs.sum_splits, {**scalars, "parts_ptr": "*fp32", "y_ptr": "*bf16"},
      dict(SPLITS=4, BLOCK=1024), 4, aligned)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_compiles_for_hopper(tmp_path: Path) -> None:
    compiles(COMPILED, tmp_path)
