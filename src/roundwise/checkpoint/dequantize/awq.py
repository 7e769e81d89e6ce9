"""Layers in the GEMM layout of AWQ (AutoAWQ): weights of 4 bits with scales and zero points.

    qweight  int32 [in, out/8]      8 codes in a word, along the output
    qzeros   int32 [groups, out/8]  zero points, packed in the same way
    scales   float [groups, out]

Bits 4i … 4i + 3 of a word are the code of output channel `ORDER[i]` of its eight.
The weight is scales · (codes - zeros), without the 1 that the GPTQ format subtracts from zero points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from roundwise.checkpoint.config_values import whole_number, word
from roundwise.checkpoint.reader import TensorInfo
from roundwise.core.quantized_weight import QuantizedWeight
from roundwise.errors import CheckpointError, ConfigError, quoted

#: Output channel, of eight, that each four bits of a word belong to, from the lowest on.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SUFFIXES = ("qweight", "qzeros", "scales")
BITS = 4


@dataclass(frozen=True)
class AwqLayer:
    """A layer whose tensors fit together."""

    name: str
    tensors: dict[str, TensorInfo]

    @property
    def bits(self) -> int:
        """Width of a code."""
        return BITS

    @property
    def format(self) -> str:
        """Usual name of the format."""
        return f"{BITS}-bit AWQ"

    @property
    def in_features(self) -> int:
        """Number of input channels."""
        return self.tensors["qweight"].shape[0]

    @property
    def out_features(self) -> int:
        """Number of output channels."""
        return self.tensors["scales"].shape[1]

    def read(self) -> QuantizedWeight:
        """Returns the layer's codes, scales and zero points.

        Raises:
            CheckpointError: a scale is not finite.
        """
        scales = self.tensors["scales"].read()
        if not bool(torch.isfinite(scales).all()):
            raise CheckpointError(f"{self.name} has a scale that is not finite")
        columns, groups = self.in_features, len(scales)
        return QuantizedWeight(
            codes=unpack(self.tensors["qweight"].read()).T.contiguous(),
            scales=scales.T.contiguous(),
            zeros=unpack(self.tensors["qzeros"].read()).T.contiguous().to(torch.int32),
            g_idx=(torch.arange(columns) // (columns // groups)).to(torch.int32),
            bits=BITS,
        )


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Returns the codes of words [n, m] in the order of output channels, uint8 [n, 8m]."""
    codes = torch.empty((*words.shape, len(ORDER)), dtype=torch.uint8)
    for place, channel in enumerate(ORDER):
        codes[..., channel] = (words >> (BITS * place)) & (2**BITS - 1)
    return codes.flatten(1)


def awq_layers(
    tensors: Mapping[str, TensorInfo], settings: Mapping[str, Any], folder: str
) -> list[AwqLayer]:
    """Returns all quantized layers of a checkpoint; reads headers only.

    Args:
        tensors: all tensors of the files by name.
        settings: quantization config.
        folder: name of the checkpoint, for error messages.

    Raises:
        ConfigError: the layout is another one, or codes do not have 4 bits.
        CheckpointError: tensors contradict the config or each other.
    """
    layout = word(settings, "version", word(settings, "checkpoint_format", "gemm"))
    bits = whole_number(settings, "bits" if "bits" in settings else "w_bit")
    if layout != "gemm" or bits not in (None, BITS):
        raise ConfigError(
            f"{folder} is quantized with AWQ in the layout {quoted(layout)[1:-1]} with {bits or BITS} "
            "bits: only gemm with 4 bits is supported, start from the original"
        )
    size = whole_number(settings, "group_size" if "group_size" in settings else "q_group_size")
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return [_layer(name, tensors, size) for name in names]


def _layer(name: str, tensors: Mapping[str, TensorInfo], group_size: int | None) -> AwqLayer:
    parts = {s: tensors[f"{name}.{s}"] for s in SUFFIXES if f"{name}.{s}" in tensors}
    missing = [suffix for suffix in SUFFIXES if suffix not in parts]
    if missing:
        raise CheckpointError(f"{name} lacks {', '.join(missing)}")
    types = {suffix: info.dtype for suffix, info in parts.items()}
    shapes = {suffix: info.shape for suffix, info in parts.items()}
    if types["qweight"] != "I32" or types["qzeros"] != "I32" or types["scales"] not in (
        "F16", "BF16", "F32",
    ):  # fmt: skip
        raise CheckpointError(f"{name} has tensors of types {', '.join(types.values())}")
    matrices = all(len(shape) == 2 and 0 not in shape for shape in shapes.values())
    if not matrices or not (
        shapes["qweight"][1] * len(ORDER) == shapes["scales"][1]
        and shapes["qzeros"] == (shapes["scales"][0], shapes["qweight"][1])
        and shapes["qweight"][0] % shapes["scales"][0] == 0
    ):
        raise CheckpointError(
            f"{name}: qweight {list(shapes['qweight'])}, qzeros {list(shapes['qzeros'])} and scales "
            f"{list(shapes['scales'])} do not fit together in the layout of AWQ"
        )
    columns, groups = shapes["qweight"][0], shapes["scales"][0]
    if group_size is not None and columns // groups != (group_size if group_size > 0 else columns):
        raise CheckpointError(
            f"{name} has {groups} groups of its {columns} input channels, but the config says "
            f"group_size={group_size}"
        )
    return AwqLayer(name, parts)
