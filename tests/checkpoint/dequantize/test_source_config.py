"""Block sizes and packed parts of a source's config; `model/test_dequantized_view.py` has refusals."""

from __future__ import annotations

import pytest

from roundwise.checkpoint.dequantize.source_config import packed_part, source_blocks
from roundwise.errors import CheckpointError

GROUPS = {
    "a": {"weights": {"block_structure": [128, 64]}, "format": "float-quantized"},
    "b": {"weights": {"group_size": 32}, "format": "pack-quantized", "input_activations": {"a": 1}},
    "c": {"weights": {"group_size": None}, "format": "float-quantized"},
    "d": {"weights": None, "format": "pack-quantized"},
}
MIXED = {"format": "mixed-precision", "config_groups": GROUPS, "kv_cache_scheme": {"num_bits": 8}}


def test_blocks() -> None:
    assert source_blocks(MIXED, "compressed-tensors", "folder") == [(128, 64), (1, 32)]
    assert source_blocks({"weight_block_size": [128, 64]}, "fp8", "folder") == [(128, 64)]
    assert source_blocks({"weight_block_size": None}, "fp8", "folder") == []


@pytest.mark.parametrize("size", [[128], [0, 8], [8, "8"], 128, {"a": 1}])
def test_sizes_that_are_none(size: object) -> None:
    with pytest.raises(CheckpointError, match=r"weight_block_size in .* folder is not two numbers"):
        source_blocks({"weight_block_size": size}, "fp8", "folder")


def test_the_packed_part() -> None:
    """Activations and other formats say nothing about packed integers."""
    part = packed_part(MIXED, "folder")
    assert [*part["config_groups"]] == ["1", "3"]
    assert part["config_groups"]["1"] == {**GROUPS["b"], "input_activations": None}
    assert (part["format"], part["kv_cache_scheme"]) == ("pack-quantized", None)
