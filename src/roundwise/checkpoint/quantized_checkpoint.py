"""A quantized checkpoint in either format, GPTQ or compressed-tensors, read layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from roundwise.checkpoint import compressed_tensors
from roundwise.checkpoint.compressed_tensors import PackedLayer
from roundwise.checkpoint.quantization_config import (
    QuantizationConfig,
    quantization_method,
    raw_quantization_config,
    read_quantization_config,
)
from roundwise.checkpoint.quantized_layers import QuantizedLayer, find_layers
from roundwise.checkpoint.reader import Checkpoint, TensorInfo
from roundwise.core.quantized_weight import QuantizedWeight


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of the result that is computed only when its shard is written."""

    name: str
    nbytes: int
    """Approximate size, for dividing tensors into shards."""
    compute: Callable[[], torch.Tensor | TensorInfo]
    """Returns the tensor, or the location of one that is copied byte for byte."""

    def read(self) -> torch.Tensor:
        """Computes the tensor, or reads it from its file."""
        tensor = self.compute()
        return tensor.read() if isinstance(tensor, TensorInfo) else tensor


def copied_tensor(name: str, info: TensorInfo) -> LazyTensor:
    """Returns the lazy tensor that is copied byte for byte from its file."""
    return LazyTensor(name, info.nbytes, lambda: info)


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """The quantized layers of a checkpoint in GPTQ or compressed-tensors format."""

    config: QuantizationConfig | None
    """Its quantization config; None: it is in compressed-tensors format."""
    layers: dict[str, QuantizedLayer | PackedLayer]
    """Layers by name."""

    def read(self, name: str) -> QuantizedWeight:
        """Returns a layer's codes, scales and zero points.

        Raises:
            CheckpointError: the layer's tensors contradict each other.
            ConfigError: float16 cannot represent its scales exactly (compressed-tensors only).
        """
        return self.layers[name].read()

    def shape(self, name: str) -> tuple[int, int]:
        """Returns (out_features, in_features) of a layer; reads no codes.

        Raises:
            CheckpointError: the shapes of the layer's tensors contradict each other.
        """
        layer = self.layers[name]
        if isinstance(layer, PackedLayer):
            return layer.shape()
        return layer.out_features, layer.in_features

    def replace_layers(
        self, checkpoint: Checkpoint, convert_layer: Callable[[str], Iterable[LazyTensor]]
    ) -> Iterator[LazyTensor]:
        """Yields all tensors of the checkpoint, with those of the quantized layers replaced.

        Args:
            checkpoint: the checkpoint that the layers belong to.
            convert_layer: returns the new tensors of a layer, from its name; called once per layer.
        """
        layer_of = {
            f"{name}.{suffix}": name
            for name, layer in self.layers.items()
            for suffix in layer.tensors
        }
        converted = set()
        for name, info in checkpoint.tensors.items():
            if name not in layer_of:
                yield copied_tensor(name, info)
            elif layer_of[name] not in converted:
                converted.add(layer_of[name])
                yield from convert_layer(layer_of[name])


def open_quantized(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    """Returns the quantized layers of a checkpoint in GPTQ or compressed-tensors format.

    Raises:
        CheckpointError: it is in neither format, or damaged.
        ConfigError: more than weights is quantized.
    """
    raw = raw_quantization_config(checkpoint)
    if raw is not None and quantization_method(raw) == compressed_tensors.METHOD:
        return QuantizedCheckpoint(None, {**compressed_tensors.packed_layers(checkpoint, raw)})
    config = read_quantization_config(checkpoint)
    layers = {layer.name: layer for layer in find_layers(checkpoint.tensors, config)}
    return QuantizedCheckpoint(config, {**layers})
