"""A quantized checkpoint beside the model that it was made from, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from roundwise.checkpoint.manifest import LayerRecord, Manifest, find_record, read_manifest
from roundwise.checkpoint.quantization_config import (
    raw_quantization_config,
    read_quantization_config,
)
from roundwise.checkpoint.quantized_layers import QuantizedLayer, find_layers
from roundwise.checkpoint.reader import Checkpoint, CheckpointView, TensorInfo
from roundwise.core.quantized_weight import QuantizedWeight
from roundwise.errors import CheckpointError, ConfigError
from roundwise.model.blocks import check_quantized_head, quantized_head
from roundwise.model.build import load_config
from roundwise.model.dequantized_view import dequantized_checkpoint
from roundwise.model.expert_weights import unquantized_tensors
from roundwise.model.rotate import apply_recorded_rotation
from roundwise.model.streamed import unfused_checkpoint
from roundwise.system.hub import local_folder
from roundwise.verify import weight_error_failure


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A quantized checkpoint and its original."""

    checkpoint: Checkpoint
    layers: Mapping[str, QuantizedLayer]
    """The quantized layers by name."""
    original: Mapping[str, TensorInfo]
    """Tensors of the original with one weight per layer: its values, dequantized without rounding."""
    quantized_from: Checkpoint
    """The original as it was quantized: rotated, if the checkpoint is."""
    is_rotated: bool
    changed: Mapping[str, TensorInfo]
    """Tensors of the checkpoint that are not quantized and that differ from the original's."""
    manifest: Manifest | None

    @cached_property
    def _records(self) -> dict[str, LayerRecord]:
        return {record.name: record for record in (self.manifest.layers if self.manifest else [])}

    def read(self, layer: str) -> QuantizedWeight:
        """Returns a layer's codes after comparing them with the original.

        Raises:
            CheckpointError: the layer is damaged or was not made from this original.
        """
        q = self.layers[layer].read()
        record = find_record(self._records, layer)
        failure = weight_error_failure(layer, q, self.quantized_from, record)
        if failure:
            raise CheckpointError(f"{self.quantized_from.folder} is not the original: {failure}")
        return q


def open_pair(folder: Path, original: Path | None) -> ModelPair:
    """Opens a quantized checkpoint and its original; reads all tensors that are not quantized.

    Args:
        folder: folder of the quantized checkpoint.
        original: folder of the original; None: the one that the manifest names.

    Raises:
        CheckpointError: one of them is missing or damaged, or the checkpoint has no quantized layers.
        ConfigError: nothing says what the original is.
    """
    checkpoint = Checkpoint(folder)
    config = read_quantization_config(checkpoint)
    layers = {layer.name: layer for layer in find_layers(checkpoint.tensors, config)}
    if not layers:
        raise CheckpointError(f"{folder} has no quantized layers")
    check_quantized_head(lambda: load_config(checkpoint), layers)
    manifest = read_manifest(folder)
    source = Checkpoint(original or _recorded_original(folder, manifest))
    plain = _dense(source, layers)
    exact = plain
    if raw_quantization_config(source) is not None:
        # Dequantized to float32: llama.cpp's converter rounds its template from there.
        exact = _dense(
            CheckpointView(source, source.tensors, {**source.config, "dtype": "float32"}), layers
        )
    quantized_from = apply_recorded_rotation(plain, config.raw)
    return ModelPair(
        checkpoint, layers, exact.tensors, quantized_from, quantized_from is not plain,
        dict(_changed(checkpoint, plain, layers)), manifest,
    )  # fmt: skip


def _recorded_original(folder: Path, manifest: Manifest | None) -> Path:
    """Returns the folder of the model that a manifest names."""
    given = manifest.given if manifest is not None else None
    if given is None:
        raise ConfigError(
            f"nothing in {folder} says which model it was made from: name it with --original FOLDER"
        )
    try:
        return local_folder(given.model)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; {folder} was made from it: name it with --original FOLDER"
        ) from None


def _dense(source: Checkpoint, layers: Mapping[str, QuantizedLayer]) -> Checkpoint:
    """Returns a view of a model with dense values and one weight for each layer."""
    return unfused_checkpoint(
        dequantized_checkpoint(source)[0], {*layers}, lm_head=quantized_head(layers) is not None
    )


def _changed(
    checkpoint: Checkpoint, original: Checkpoint, layers: Mapping[str, QuantizedLayer]
) -> Iterator[tuple[str, TensorInfo]]:
    """Yields the tensors of a checkpoint that are not quantized and are not the original's, by name."""
    packed = {f"{name}.{suffix}" for name, layer in layers.items() for suffix in layer.tensors}
    known = unquantized_tensors(original.tensors, {*layers})
    for name, info in checkpoint.tensors.items():
        if name not in packed and not _is_same(info, known.get(name)):
            yield name, info


def _is_same(info: TensorInfo, other: TensorInfo | None) -> bool:
    """Tells whether two tensors are equal byte for byte."""
    if other is None or (info.dtype, info.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(info.chunks(), other.chunks(), strict=True))
