"""Checkpoints that are quantized already, seen as dense ones: weights are dequantized as they are read.

FP8 with a scale per block (DeepSeek-V3 and others), and the GPTQ format. One weight is in memory at a
time; what is not quantized again is written as the dense tensor that it stands for.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from roundwise.checkpoint.gptq_format import SUFFIXES, quantized_layers
from roundwise.checkpoint.reader import (
    CHUNK,
    DTYPE_CODES,
    DTYPES,
    Checkpoint,
    CheckpointView,
    TensorInfo,
)
from roundwise.errors import CheckpointError, ConfigError
from roundwise.model.build import build, dtype_of, load_config

#: Suffix of the scales of an FP8 weight, one for each block; the other is of activations.
SCALES, ACTIVATION = "_scale_inv", "input_scale"


@dataclass(frozen=True)
class DequantizedInfo(TensorInfo):
    """A tensor that is computed whenever it is read; its place is that of what it is made from."""

    make: Callable[[], torch.Tensor]

    @classmethod
    def of(
        cls, source: TensorInfo, shape: tuple[int, ...], dtype: torch.dtype,
        make: Callable[[], torch.Tensor],
    ) -> DequantizedInfo:  # fmt: skip
        """A tensor of `shape` and `dtype`, made by `make`."""
        count = 1
        for size in shape:
            count *= size
        return cls(
            source.path, DTYPE_CODES[dtype], shape, source.start, count * dtype.itemsize, make
        )

    def memory_mapped(self, *, aligned: bool) -> tuple[torch.Tensor, mmap.mmap | None]:
        """The tensor; there is no map of it."""
        return self.make().to(DTYPES[self.dtype]).contiguous(), None

    def rows(self, start: int, count: int) -> TensorInfo:
        """Some of its rows."""
        shape = (count, *self.shape[1:])
        return DequantizedInfo.of(
            self, shape, DTYPES[self.dtype], lambda: self.make()[start : start + count]
        )

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes, a few MB at a time."""
        data = self.read().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK):
            yield bytes(data[start : start + CHUNK])


def dequantized_checkpoint(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """The checkpoint with dense weights, and what is to be said about it; itself if it is dense.

    Raises:
        ConfigError: it is quantized in another format.
        CheckpointError: tensors are missing or do not fit together.
    """
    settings = checkpoint.config.get("quantization_config")
    if settings is None:
        return checkpoint, []
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method == "fp8":
        tensors = _from_fp8(checkpoint, settings)
        notes = []
    elif method == "gptq":
        tensors = _from_gptq(checkpoint, settings)
        notes = [
            f"{checkpoint.folder} is quantized already, to {settings.get('bits')} bits: its weights are "
            "dequantized first, and what it has lost stays lost; start from the original if you can"
        ]
    else:
        raise ConfigError(
            f"{checkpoint.folder} is quantized already ({method or 'unknown'}): start from the original"
        )
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    return CheckpointView(checkpoint, tensors, config), notes


def _from_fp8(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, TensorInfo]:
    """FP8 weights times the scales of their blocks."""
    sizes = settings.get("weight_block_size")
    if not (isinstance(sizes, list) and len(sizes) == 2):
        raise ConfigError(
            f"{checkpoint.folder} holds FP8 weights without weight_block_size: only those with a scale "
            "per block can be read; start from the original"
        )
    dtype = dtype_of(checkpoint.config) or torch.bfloat16
    found: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        if name.endswith(SCALES) and name.removesuffix(SCALES) in checkpoint.tensors:
            continue
        if name.endswith(ACTIVATION):
            continue
        if not info.dtype.startswith("F8"):
            found[name] = info
            continue
        scales = checkpoint.tensors.get(name + SCALES)
        if scales is None:
            raise CheckpointError(f"{name} is in FP8, but {name}{SCALES} is missing")
        blocks = tuple(-(-size // block) for size, block in zip(info.shape, sizes, strict=True))
        if scales.shape != blocks:
            raise CheckpointError(
                f"{name}{SCALES} has shape {list(scales.shape)}; blocks of {sizes[0]} x {sizes[1]} "
                f"ask for {list(blocks)}"
            )
        found[name] = DequantizedInfo.of(
            info, info.shape, dtype, _scaled(info, scales, sizes, dtype)
        )
    return found


def _scaled(
    info: TensorInfo, scales: TensorInfo, sizes: list[int], dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        W, s = info.read(), scales.read().to(torch.float32)
        columns = s.repeat_interleave(sizes[1], dim=1)[:, : info.shape[1]]
        out = torch.empty(info.shape, dtype=dtype)
        for index, row in enumerate(columns):
            part = slice(index * sizes[0], (index + 1) * sizes[0])
            out[part] = W[part].to(torch.float32) * row
        return out

    return make


def _from_gptq(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, TensorInfo]:
    """What codes, scales and zero points stand for."""
    model = build(load_config(checkpoint), torch.float32)
    transposed = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    version = settings.get("checkpoint_format", "gptq")
    dtype = dtype_of(checkpoint.config) or torch.float16
    layers = {layer.name: layer for layer in quantized_layers(checkpoint)}
    found: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        stem, _, suffix = name.rpartition(".")
        if stem not in layers or suffix not in SUFFIXES:
            found[name] = info
        elif suffix == "qweight":
            layer = layers[stem]
            shape = (layer.parts["scales"].shape[1], layer.in_features())
            across = any(path.endswith(stem) for path in transposed)

            def make(layer: Any = layer, across: bool = across) -> torch.Tensor:
                W: torch.Tensor = layer.read(version).dequantize(dtype)
                return W.T if across else W

            shape = shape[::-1] if across else shape
            found[f"{stem}.weight"] = DequantizedInfo.of(info, shape, dtype, make)
    return found
