"""Reads how small numbers and their scales are stored from the quantization config of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roundwise.checkpoint import compressed_tensors
from roundwise.checkpoint.config_values import whole_number, word
from roundwise.checkpoint.quantization_config import MODELOPT
from roundwise.errors import CheckpointError, ConfigError, quoted

#: Methods whose weights are small numbers with scales.
SCALED_METHODS = (
    "fp8", "fbgemm_fp8", "mxfp8", "mxfp4", MODELOPT, compressed_tensors.METHOD,
)  # fmt: skip
#: Algorithms of ModelOpt that store such weights, and formats of compressed-tensors.
MODELOPT_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "MXFP4", "MXFP8")
COMPRESSED_FORMATS = (
    compressed_tensors.FORMAT, "int-quantized", "float-quantized", "naive-quantized",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip


def source_blocks(settings: Mapping[str, Any], method: str, folder: str) -> list[tuple[int, int]]:
    """Returns the sizes of blocks that a config names: (rows, columns) that share a scale.

    Args:
        settings: quantization config, as a JSON object.
        method: one of `SCALED_METHODS`.
        folder: name of the checkpoint, for error messages.

    Raises:
        ConfigError: weights are stored in a form that is not supported as a source.
        CheckpointError: a size is not valid.
    """
    if method == compressed_tensors.METHOD:
        return _compressed_blocks(settings, folder)
    algorithm = settings.get("quant_algo")
    if method == MODELOPT and algorithm not in MODELOPT_ALGORITHMS:
        raise ConfigError(
            f"{folder} is quantized already (modelopt, {quoted(str(algorithm))[1:-1]}): only "
            f"{', '.join(MODELOPT_ALGORITHMS)} are supported, start from the original"
        )
    size = settings.get("weight_block_size")
    return [_pair(size, "weight_block_size", folder)] if size else []


def packed_part(settings: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Returns a config of compressed-tensors with its groups of packed integers only.

    Args:
        settings: the config of a source, which may quantize activations and have groups of any format.
        folder: name of the checkpoint, for error messages.
    """
    shared = word(settings, "format", compressed_tensors.FORMAT)
    groups = {
        str(index): {**group, "input_activations": None}
        for index, group in enumerate(compressed_tensors.config_groups(settings, folder))
        if word(group, "format", shared) == compressed_tensors.FORMAT
    }
    return {
        **settings, "format": compressed_tensors.FORMAT, "config_groups": groups,
        "kv_cache_scheme": None,
    }  # fmt: skip


def _compressed_blocks(settings: Mapping[str, Any], folder: str) -> list[tuple[int, int]]:
    groups = [*compressed_tensors.config_groups(settings, folder)]
    shared = word(settings, "format", compressed_tensors.FORMAT)
    formats = {word(group, "format", shared) for group in groups}
    if unknown := sorted(formats - {*COMPRESSED_FORMATS}):
        raise ConfigError(
            f"{folder} is in compressed-tensors format {quoted(unknown[0])[1:-1]}: as a source only "
            f"{', '.join(COMPRESSED_FORMATS)} are supported, start from the original"
        )
    if settings.get("transform_config") or settings.get("sparsity_config"):
        raise ConfigError(
            f"{folder} has transforms or sparse weights beside its quantization, which are not "
            "supported: start from the original"
        )
    blocks: list[tuple[int, int]] = []
    for group in groups:
        weights = group.get("weights")
        if not isinstance(weights, dict):
            continue
        size = whole_number(weights, "group_size")
        if weights.get("block_structure"):
            blocks.append(_pair(weights["block_structure"], "block_structure", folder))
        elif size is not None and size > 0:
            blocks.append((1, size))
    return blocks


def _pair(size: Any, key: str, folder: str) -> tuple[int, int]:
    """Returns the two sizes of a block.

    Raises:
        CheckpointError: it is something else.
    """
    if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) for n in size):
        rows, columns = size
        if rows > 0 and columns > 0:
            return rows, columns
    raise CheckpointError(
        f"{key} in the quantization config of {folder} is not two numbers above 0"
    )
