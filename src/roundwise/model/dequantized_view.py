"""A view of a quantized checkpoint that dequantizes weights while they are read.

It supports the formats that models are published in: FP8, MXFP8, MXFP4, NVFP4 and INT8 with scales per
block, row or tensor; GPTQ, AWQ and packed integers of compressed-tensors. One weight is in memory at a
time; layers that a run skips are written dequantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from roundwise.checkpoint.compressed_tensors import METHOD
from roundwise.checkpoint.dequantize.awq import AwqLayer, awq_layers
from roundwise.checkpoint.dequantize.find_scaled import find_scaled, has_scales
from roundwise.checkpoint.dequantize.source_config import (
    SCALED_METHODS,
    packed_part,
    source_blocks,
)
from roundwise.checkpoint.quantization_config import (
    is_packed,
    parse_quantization_config,
    quantization_method,
    raw_quantization_config,
    read_quantization_config,
    without_quantization_config,
)
from roundwise.checkpoint.quantized_layers import QuantizedLayer, find_layers
from roundwise.checkpoint.reader import Checkpoint, CheckpointView, TensorInfo
from roundwise.checkpoint.transformed_view import ComputedInfo, stored_as
from roundwise.errors import CheckpointError, ConfigError, quoted
from roundwise.model.blocks import check_quantized_head
from roundwise.model.build import build, config_dtype, load_config

#: Methods whose models transformers can make dense.
DENSE_IN_TRANSFORMERS = ("bitsandbytes", "higgs")
#: Key outside the quantization config in which DeepSeek-V4 says how its experts are stored.
EXPERT_DTYPE = "expert_dtype"

PackedLayer = QuantizedLayer | AwqLayer


def dequantized_checkpoint(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """Returns a view of the checkpoint with dense weights, and warnings for the user.

    A checkpoint that is not quantized is returned unchanged.

    Raises:
        ConfigError: the checkpoint is quantized in an unsupported format.
        CheckpointError: tensors are missing or contradict each other.
    """
    settings = raw_quantization_config(checkpoint)
    if settings is None:
        if is_packed(checkpoint.tensors):
            read_quantization_config(checkpoint)  # raises: nothing says how to read them
        if has_scales(checkpoint.tensors):
            raise CheckpointError(
                f"{checkpoint.folder} has quantized weights with scales: it has no quantization_config "
                "that says how to read them"
            )
        return checkpoint, []
    method = quantization_method(settings)
    folder, tensors, layers = str(checkpoint.folder), checkpoint.tensors, list[PackedLayer]()
    if method in SCALED_METHODS:
        tensors = _without_scales(checkpoint, method, settings)
        if method == METHOD:
            packed = parse_quantization_config(packed_part(settings, folder), folder)
            layers += find_layers(tensors, packed)
    elif method == "gptq":
        layers += find_layers(tensors, read_quantization_config(checkpoint))
    elif method == "awq":
        layers += awq_layers(tensors, settings, folder)
    else:
        raise ConfigError(_refusal(folder, method))
    if layers:
        tensors = _without_codes(checkpoint, tensors, layers)
    if not any(map(stored_as, tensors.values())):
        raise CheckpointError(
            f"{folder} has a quantization_config ({quoted(method)[1:-1]}), but no quantized "
            "weights: remove it from config.json if these are the right files"
        )
    config = without_quantization_config(checkpoint.config)
    config.pop(EXPERT_DTYPE, None)
    return CheckpointView(checkpoint, tensors, config), _warnings(folder, layers)


def _warnings(folder: str, layers: Sequence[PackedLayer]) -> list[str]:
    """Returns a warning if weights have lost accuracy already."""
    widths = sorted({layer.bits for layer in layers})
    return [
        f"{folder} is quantized already, to {' and '.join(map(str, widths))} bits: its weights "
        "are dequantized first and keep that loss of accuracy; start from the original if you can"
    ] * bool(widths)


def _refusal(folder: str, method: str) -> str:
    """Returns why a method is not supported, and the way out."""
    advice = "start from the original"
    if method in DENSE_IN_TRANSFORMERS:
        advice += (
            ", or write its weights dense with transformers: from_pretrained(...).dequantize(), then "
            "save_pretrained(...)"
        )
    return f"{folder} is quantized already ({quoted(method)[1:-1]}): {advice}"


def _without_scales(
    checkpoint: Checkpoint, method: str, settings: dict[str, Any]
) -> dict[str, TensorInfo]:
    """Returns the tensors with dense weights in place of small numbers and their scales."""
    folder, tensors = str(checkpoint.folder), checkpoint.tensors
    scaled = find_scaled(
        tensors, config_dtype(checkpoint.config) or torch.bfloat16,
        bytes_are="FP4" if method == "fp8" else "INT8",
        blocks=source_blocks(settings, method, folder),
    )  # fmt: skip
    rest = {name: info for name, info in tensors.items() if name not in scaled.used}
    if clash := {*scaled.weights} & {*rest}:
        raise CheckpointError(f"{folder} has {min(clash)} twice: dense, and quantized")
    return rest | {name: weight.dense() for name, weight in scaled.weights.items()}


def _without_codes(
    checkpoint: Checkpoint, tensors: dict[str, TensorInfo], layers: Sequence[PackedLayer]
) -> dict[str, TensorInfo]:
    """Returns the tensors with each layer's weight in place of its packed codes."""
    check_quantized_head(lambda: load_config(checkpoint), [layer.name for layer in layers])
    model = build(load_config(checkpoint), torch.float32)
    conv1d_names = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    dtype = config_dtype(checkpoint.config) or torch.float16
    used = {f"{layer.name}.{suffix}" for layer in layers for suffix in layer.tensors}
    dense: dict[str, TensorInfo] = {}
    for layer in layers:
        is_conv1d = any(path.endswith(layer.name) for path in conv1d_names)

        def compute(layer: PackedLayer = layer, is_conv1d: bool = is_conv1d) -> torch.Tensor:
            W = layer.read().dequantize(dtype)
            return W.T if is_conv1d else W

        shape = (layer.out_features, layer.in_features)
        dense[f"{layer.name}.weight"] = ComputedInfo.from_source(
            next(iter(layer.tensors.values())), shape[::-1] if is_conv1d else shape, dtype,
            compute, stored_as=layer.format,
        )  # fmt: skip
    return {name: info for name, info in tensors.items() if name not in used} | dense
