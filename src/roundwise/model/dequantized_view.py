"""A view of a quantized checkpoint that dequantizes weights while they are read.

It supports FP8 with a scale per block (DeepSeek-V3 and others), GPTQ and compressed-tensors. One
weight is in memory at a time; layers that a run skips are written dequantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from roundwise.checkpoint import compressed_tensors
from roundwise.checkpoint.quantization_config import (
    is_packed,
    quantization_method,
    raw_quantization_config,
    read_quantization_config,
    without_quantization_config,
)
from roundwise.checkpoint.quantized_layers import QuantizedLayer, quantized_layers
from roundwise.checkpoint.reader import Checkpoint, CheckpointView, TensorInfo
from roundwise.checkpoint.transformed_view import ComputedInfo
from roundwise.errors import CheckpointError, ConfigError, quoted
from roundwise.model.blocks import check_quantized_head
from roundwise.model.build import build, config_dtype, load_config

#: Suffix of the tensor with an FP8 weight's scales, one per block.
SCALES_SUFFIX = "_scale_inv"
#: Suffix of scales of activations, which are not needed.
ACTIVATION_SUFFIX = "input_scale"


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
        return checkpoint, []
    method = quantization_method(settings)
    if method == "fp8":
        tensors = _from_fp8(checkpoint, settings)
        warnings = []
    elif method in ("gptq", compressed_tensors.METHOD):
        layers = quantized_layers(checkpoint)
        check_quantized_head(lambda: load_config(checkpoint), [layer.name for layer in layers])
        tensors = _from_packed(checkpoint, layers)
        widths = sorted({layer.bits for layer in layers})
        warnings = [
            f"{checkpoint.folder} is quantized already, to {' and '.join(map(str, widths))} bits: its "
            "weights are dequantized first and keep that loss of accuracy; start from the original if "
            "you can"
        ]
    else:
        raise ConfigError(
            f"{checkpoint.folder} is quantized already ({quoted(method)[1:-1]}): start from the original"
        )
    config = without_quantization_config(checkpoint.config)
    return CheckpointView(checkpoint, tensors, config), warnings


def _from_fp8(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, TensorInfo]:
    """Returns the tensors of an FP8 checkpoint; each FP8 weight is multiplied by its blocks' scales."""
    block_size = settings.get("weight_block_size")
    if not (isinstance(block_size, list) and len(block_size) == 2):
        raise ConfigError(
            f"{checkpoint.folder} holds FP8 weights without weight_block_size: only FP8 with a scale per"
            " block is supported; start from the original"
        )
    dtype = config_dtype(checkpoint.config) or torch.bfloat16
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        if name.endswith(SCALES_SUFFIX) and name.removesuffix(SCALES_SUFFIX) in checkpoint.tensors:
            continue
        if name.endswith(ACTIVATION_SUFFIX):
            continue
        if not info.dtype.startswith("F8"):
            tensors[name] = info
            continue
        scales = checkpoint.tensors.get(name + SCALES_SUFFIX)
        if scales is None:
            raise CheckpointError(f"{name} is in FP8, but {name}{SCALES_SUFFIX} is missing")
        blocks = tuple(-(-size // b) for size, b in zip(info.shape, block_size, strict=True))
        if scales.shape != blocks:
            raise CheckpointError(
                f"{name}{SCALES_SUFFIX} has shape {list(scales.shape)}; blocks of "
                f"{block_size[0]} x {block_size[1]} require {list(blocks)}"
            )
        tensors[name] = ComputedInfo.from_source(
            info, info.shape, dtype, _dequantize_blocks(info, scales, block_size, dtype)
        )
    return tensors


def _dequantize_blocks(
    info: TensorInfo, scales: TensorInfo, block_size: list[int], dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """Returns a function that reads an FP8 weight and multiplies each block by its scale."""

    def compute() -> torch.Tensor:
        W, s = info.read(), scales.read().to(torch.float32)
        columns = s.repeat_interleave(block_size[1], dim=1)[:, : info.shape[1]]
        out = torch.empty(info.shape, dtype=dtype)
        for index, row_scales in enumerate(columns):
            rows = slice(index * block_size[0], (index + 1) * block_size[0])
            out[rows] = W[rows].to(torch.float32) * row_scales
        return out

    return compute


def _from_packed(checkpoint: Checkpoint, quantized: list[QuantizedLayer]) -> dict[str, TensorInfo]:
    """Returns the tensors of a checkpoint with each layer's weight in place of its packed codes."""
    model = build(load_config(checkpoint), torch.float32)
    conv1d_names = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    dtype = config_dtype(checkpoint.config) or torch.float16
    layers = {layer.name: layer for layer in quantized}
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        stem, _, suffix = name.rpartition(".")
        layer = layers.get(stem)
        if layer is None or suffix not in layer.tensors:
            tensors[name] = info
        elif suffix == layer.layout.codes:
            is_conv1d = any(path.endswith(stem) for path in conv1d_names)

            def compute(layer: QuantizedLayer = layer, is_conv1d: bool = is_conv1d) -> torch.Tensor:
                W = layer.read().dequantize(dtype)
                return W.T if is_conv1d else W

            shape = (layer.out_features, layer.in_features)
            shape = shape[::-1] if is_conv1d else shape
            tensors[f"{stem}.weight"] = ComputedInfo.from_source(info, shape, dtype, compute)
    return tensors
