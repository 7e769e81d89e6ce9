"""A quantized checkpoint in either format, and the tensors of what it is turned into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from roundwise.core.quantized import QuantizedWeight
from roundwise.models import compressed
from roundwise.models.checkpoint import Checkpoint, TensorInfo
from roundwise.models.compressed import PackedLayer
from roundwise.models.formats import QuantizedLayer, quantization_settings, quantized_layers


@dataclass(frozen=True)
class Piece:
    """A tensor of the result; made when it is its turn."""

    name: str
    nbytes: int
    """About."""
    make: Callable[[], torch.Tensor | TensorInfo]

    def read(self) -> torch.Tensor:
        """The tensor, in memory."""
        made = self.make()
        return made.read() if isinstance(made, TensorInfo) else made


def as_is(name: str, info: TensorInfo) -> Piece:
    """A tensor byte for byte."""
    return Piece(name, info.nbytes, lambda: info)


@dataclass(frozen=True)
class Source:
    """A quantized checkpoint in either format."""

    settings: dict[str, Any]
    version: str | None
    """gptq or gptq_v2; None: compressed-tensors."""
    layers: dict[str, QuantizedLayer | PackedLayer]

    def read(self, name: str) -> QuantizedWeight:
        """A layer's codes, scales and zero points."""
        layer = self.layers[name]
        return (
            layer.read(self.version or "gptq")
            if isinstance(layer, QuantizedLayer)
            else layer.read()
        )

    def shape(self, name: str) -> tuple[int, int]:
        """A layer's output and input channels."""
        layer = self.layers[name]
        if isinstance(layer, PackedLayer):
            return layer.shape()
        return layer.parts["scales"].shape[1], layer.in_features()

    def replaced(
        self, checkpoint: Checkpoint, make: Callable[[str], Iterable[Piece]]
    ) -> Iterator[Piece]:
        """All tensors of the checkpoint: those of a layer as `make` has them, others as they are."""
        owner = {
            f"{name}.{part}": name for name, layer in self.layers.items() for part in layer.parts
        }
        begun = set()
        for name, info in checkpoint.tensors.items():
            if name not in owner:
                yield as_is(name, info)
            elif owner[name] not in begun:
                begun.add(owner[name])
                yield from make(owner[name])


def open_source(checkpoint: Checkpoint) -> Source:
    """The layers of a checkpoint in whichever format it is.

    Raises:
        CheckpointError: it is in neither, or damaged.
        ConfigError: more than weights is quantized.
    """
    settings = checkpoint.config.get("quantization_config")
    if isinstance(settings, dict) and settings.get("quant_method") == compressed.METHOD:
        return Source(settings, None, {**compressed.packed_layers(checkpoint)})
    settings = quantization_settings(checkpoint)
    layers = {layer.name: layer for layer in quantized_layers(checkpoint)}
    return Source(settings, settings.get("checkpoint_format", "gptq"), {**layers})
