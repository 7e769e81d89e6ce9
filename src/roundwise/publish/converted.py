"""Writes the model card of a converted checkpoint again: with its own format, size and engines."""

from __future__ import annotations

from pathlib import Path

import torch

from roundwise.checkpoint.engines import served_by
from roundwise.checkpoint.manifest import Manifest
from roundwise.checkpoint.quantization_config import is_packed
from roundwise.checkpoint.quantized_layers import QuantizedLayer, quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.untrusted import limit_module_count
from roundwise.model.build import build, load_config
from roundwise.model.expert_weights import fused_expert_tensors
from roundwise.model.moe import parse_expert_name
from roundwise.plan.stored_layers import stored_layers
from roundwise.publish.card import CARD, retag_card, write_card


def rewrite_converted_card(out: Path, file_format: str, manifest: Manifest | None) -> None:
    """Writes the card that a conversion carried over again; a no-op without a card.

    Args:
        out: the converted checkpoint.
        file_format: its format: gptq, gptq_v2, compressed-tensors or dense.
        manifest: manifest of the checkpoint that was converted; None: roundwise did not make it, so
            only the tags of its card are changed.

    Raises:
        StorageError: the disk is full or failed.
    """
    if not (out / CARD).is_file():
        return
    if manifest is None:
        retag_card(out, file_format.removesuffix("_v2"))
        return
    checkpoint = Checkpoint(out)
    write_card(out, _of_result(manifest, checkpoint, file_format), checkpoint.config)


def _of_result(manifest: Manifest, checkpoint: Checkpoint, file_format: str) -> Manifest:
    """Returns the manifest of the source with what is different for the result."""
    layers = quantized_layers(checkpoint) if is_packed(checkpoint.tensors) else []
    engines, bits_per_weight = dict[str, str | None](), manifest.bits_per_weight
    if layers:
        stored_settings = stored_layers(
            layers,
            str(checkpoint.config.get("model_type")),
            fused_experts=_has_fused_experts(checkpoint, layers),
            towers=bool(manifest.run.config.get("towers")),
        )
        engines = served_by(stored_settings)
        stored = sum(info.nbytes for layer in layers for info in layer.tensors.values())
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        bits_per_weight = 8 * stored / weights
    settings = {**manifest.run.config, "format": file_format}
    return manifest.model_copy(
        update={
            "run": manifest.run.model_copy(update={"config": settings}),
            "bits_per_weight": bits_per_weight,
            "bytes_after": checkpoint.nbytes(),
            "served_by": engines,
        }
    )


def _has_fused_experts(checkpoint: Checkpoint, layers: list[QuantizedLayer]) -> bool:
    """Tells whether the original's files have all experts of a layer in one tensor."""
    names = [layer.name for layer in layers]
    if not any(map(parse_expert_name, names)):
        return False
    with limit_module_count(len(checkpoint.tensors)):
        model = build(load_config(checkpoint), torch.float32)
    return bool(fused_expert_tensors(model, names))
