"""Weights with a scale per block: any grid of scales, whole or in parts, a few rows at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from roundwise.checkpoint.dequantize.scaled import FP4_VALUES, scaled_weight
from roundwise.checkpoint.reader import TensorInfo
from roundwise.errors import CheckpointError
from tests.checkpoint.test_transformed_view import saved

F8 = torch.float8_e4m3fn


def infos(folder: Path, **tensors: torch.Tensor) -> dict[str, TensorInfo]:
    return saved(folder, **tensors).tensors


@pytest.mark.parametrize("chunk", [1, 70, 1 << 18])
@pytest.mark.parametrize(
    ("shape", "grid", "blocks"),
    [
        ((6, 64), (), []),  # one scale
        ((6, 64), (1,), []),
        ((6, 64), (6,), []),  # one for each row
        ((6, 64), (6, 1), []),
        ((6, 64), (6, 2), []),  # 32 numbers
        ((6, 64), (6, 4), []),  # 16 numbers
        ((6, 64), (3, 2), []),  # equal blocks that the config does not name
        ((5, 70), (2, 3), [(4, 32)]),  # the last blocks are smaller
        ((3, 6, 64), (3, 2, 4), [(4, 16)]),  # a stack of experts
        ((3, 6, 64), (3,), []),
        ((3, 6, 64), (1,), []),
        ((3, 6, 64), (3, 6), []),
    ],
)
def test_each_number_is_multiplied_by_the_scale_of_its_block(
    shape: tuple[int, ...], grid: tuple[int, ...], blocks: list[tuple[int, int]], chunk: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("roundwise.checkpoint.dequantize.scaled.CHUNK_NUMEL", chunk)
    codes, scales = torch.randn(shape).to(F8), torch.rand(grid) + 0.5
    read = infos(tmp_path, codes=codes, scales=scales)
    weight = scaled_weight("w", "FP8", read["codes"], read["scales"], torch.float32, blocks=blocks)
    rows, columns = (
        blocks[0] if blocks else (-(-shape[-2] // (grid[-2] if len(grid) > 1 else 1)), 1)
    )
    expected = torch.empty(shape)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in shape)).tolist():
        *expert, i, j = index
        if len(grid) == len(shape):
            columns = blocks[0][1] if blocks else shape[-1] // grid[-1]
            scale = scales[(*expert, i // rows, j // columns)]
        else:  # the first axes only
            scale = scales[tuple(index[: len(grid)])] if scales.numel() > 1 else scales.reshape(())
        expected[tuple(index)] = codes[tuple(index)].float() * scale
    dense = weight.dense()
    assert torch.equal(dense.read(), expected)
    assert torch.equal(dense.rows(1, 2).read(), expected[1:3])
    if len(shape) == 2:
        assert torch.equal(dense.rows(2, 3).rows(1, 2).read(), expected[3:5])


def test_fp4_numbers(tmp_path: Path) -> None:
    pairs = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    read = infos(tmp_path, codes=pairs, scales=torch.tensor([[130], [126]], dtype=torch.uint8))
    W = scaled_weight("w", "FP4", read["codes"], read["scales"], torch.bfloat16).dense().read()
    for row, factor in ((0, 8.0), (1, 0.5)):
        for byte in range(128):
            low, high = pairs[row, byte] & 15, pairs[row, byte] >> 4
            assert W[row, 2 * byte] == factor * FP4_VALUES[low]
            assert W[row, 2 * byte + 1] == factor * FP4_VALUES[high]
    assert FP4_VALUES[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert FP4_VALUES[8:] == tuple(-value for value in FP4_VALUES[:8])


def test_zero_points_and_a_factor(tmp_path: Path) -> None:
    codes = torch.randint(-128, 128, (4, 64), dtype=torch.int8)
    scales, zeros = torch.rand(4, 2), torch.randint(-128, 128, (4, 2), dtype=torch.int8)
    read = infos(tmp_path, codes=codes, scales=scales, zeros=zeros, factor=torch.tensor(2.5))
    parts = {"zeros": read["zeros"], "factor": read["factor"]}
    for divides in (False, True):
        weight = scaled_weight(
            "w", "INT8", read["codes"], read["scales"], torch.float32, divides=divides, **parts
        )
        factors = scales / 2.5 if divides else scales * 2.5
        expected = (codes.unflatten(1, (2, 32)).float() - zeros[..., None]) * factors[..., None]
        assert torch.equal(weight.dense().read(), expected.flatten(1))
        assert torch.equal(weight.dense().rows(2, 1).read(), expected.flatten(1)[2:3])


def test_names_of_formats(tmp_path: Path) -> None:
    read = infos(
        tmp_path, codes=torch.zeros(64, 64, dtype=torch.uint8), fp8=torch.zeros(64, 64, dtype=F8),
        mx=torch.zeros(64, 4, dtype=torch.uint8), nv=torch.zeros(64, 8, dtype=F8),
        mx8=torch.zeros(64, 2, dtype=torch.uint8), tiles=torch.zeros(2, 2, dtype=torch.uint8),
    )  # fmt: skip

    def name(kind: str, codes: str, scales: str) -> str:
        return scaled_weight("w", kind, read[codes], read[scales], torch.bfloat16).format

    assert name("FP4", "codes", "mx") == "MXFP4"
    assert name("FP4", "codes", "nv") == "NVFP4"
    assert name("FP8", "fp8", "mx8") == "MXFP8"
    assert name("FP8", "fp8", "tiles") == "FP8"


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    read = infos(
        tmp_path, codes=torch.zeros(6, 64, dtype=F8), vector=torch.zeros(6, dtype=F8),
        odd=torch.ones(5, 1), whole=torch.ones(6, 2, dtype=torch.int32), fits=torch.ones(6, 2),
        zeros=torch.zeros(6, 1, dtype=torch.int8),
    )  # fmt: skip

    def refused(message: str, codes: str = "codes", scales: str = "fits", **more: str) -> None:
        parts = {key: read[value] for key, value in more.items()}
        with pytest.raises(CheckpointError, match=message):
            scaled_weight("w", "FP8", read[codes], read[scales], torch.bfloat16, **parts)

    refused("w holds FP8 numbers, but is not a matrix", codes="vector")
    refused(r"the scales of w have shape \[5, 1\], which does not divide \[6, 64\]", scales="odd")
    refused("w has scales of type I32, which no format has", scales="whole")
    refused(r"w has zero points \[6, 1\] for scales \[6, 2\]", zeros="zeros")
    refused("w has 12 factors instead of one", factor="fits")
