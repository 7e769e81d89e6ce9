"""`roundwise inspect`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from roundwise.cli.options import JsonOption
from roundwise.cli.output import print_json, print_line
from roundwise.errors import MAX_QUOTED
from roundwise.system.console import count_of, stdout, visible
from roundwise.system.memory import format_size

if TYPE_CHECKING:
    from roundwise.checkpoint.quantized_layers import QuantizedLayer
    from roundwise.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class LayerSummary:
    """A quantized layer."""

    name: str
    bits: int
    group_size: int
    in_features: int
    out_features: int
    act_order: bool
    bits_per_weight: float
    """Scales, zero points and g_idx included."""


@dataclass(frozen=True)
class CheckpointSummary:
    """Content of a checkpoint; `as_dict` is what `roundwise inspect --json` prints."""

    checkpoint: str
    architecture: str
    files: int
    bytes: int
    quantization: dict[str, Any] | None
    """Its quantization config; None: nothing is quantized."""
    layers: list[LayerSummary]
    other_tensors: int
    """Number of tensors that are not quantized."""
    other_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return asdict(self)


def command(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint folder, or id on the Hugging Face hub.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Show what is in a checkpoint, without loading it."""
    summary = summarize(checkpoint)
    if as_json:
        print_json(summary.as_dict())
        return
    size = f" {format_size(summary.bytes)}, {count_of(summary.files, 'file')}"
    print_line(size, label=visible(summary.architecture[:MAX_QUOTED]), style="bold")
    for key, value in (summary.quantization or {"quantized": "no"}).items():
        print_line(f"  {key}: {value}")
    if summary.layers:
        stdout.print(_layer_table(summary.layers))
    print_line(
        f"{summary.other_tensors} tensors are not quantized ({format_size(summary.other_bytes)})"
    )


def _layer_table(layers: list[LayerSummary]) -> Table:
    """Returns a table with one row for all layers that are alike."""
    table = Table("layers", "bits", "group", "in", "out", "act-order", "bits per weight")
    alike = Counter(
        (
            layer.bits, layer.group_size, layer.in_features, layer.out_features, layer.act_order,
            round(layer.bits_per_weight, 3),
        )
        for layer in layers
    )  # fmt: skip
    for values, count in alike.items():
        table.add_row(str(count), *map(str, values))
    return table


def summarize(name: str) -> CheckpointSummary:
    """Returns what is in a checkpoint; reads headers, scales, zero points and g_idx, but no codes.

    Args:
        name: folder, or id on the Hugging Face hub.
    """
    from roundwise.checkpoint.quantization_config import is_packed, read_quantization_config
    from roundwise.checkpoint.quantized_layers import find_layers
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.system.hub import local_folder

    checkpoint = Checkpoint(local_folder(name))
    config = read_quantization_config(checkpoint) if is_packed(checkpoint.tensors) else None
    found = find_layers(checkpoint.tensors, config) if config is not None else []
    _check_head(checkpoint, found)
    layers = [_summarize_layer(layer) for layer in found]
    architectures = checkpoint.config.get("architectures")
    packed = {f"{layer.name}.{suffix}" for layer in found for suffix in layer.tensors}
    others = [info for tensor, info in checkpoint.tensors.items() if tensor not in packed]
    return CheckpointSummary(
        checkpoint=str(checkpoint.folder),
        architecture=(
            str(architectures[0])
            if isinstance(architectures, list) and architectures
            else "unknown"
        ),
        files=len(checkpoint.files),
        bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        quantization=config.as_json() if config is not None else None,
        layers=layers,
        other_tensors=len(others),
        other_bytes=sum(info.nbytes for info in others),
    )


def _check_head(checkpoint: Checkpoint, layers: list[QuantizedLayer]) -> None:
    if any(layer.name.endswith("head") for layer in layers):  # transformers takes seconds to import
        from roundwise.model.blocks import check_quantized_head
        from roundwise.model.build import load_config

        check_quantized_head(lambda: load_config(checkpoint), [layer.name for layer in layers])


def _summarize_layer(layer: QuantizedLayer) -> LayerSummary:
    import torch

    layer.check()
    stored_g_idx = layer.tensors.get(layer.layout.g_idx)
    g_idx = stored_g_idx.read() if stored_g_idx is not None else None
    in_order = torch.arange(layer.in_features) // layer.group_size
    stored = sum(info.nbytes for info in layer.tensors.values())
    return LayerSummary(
        name=layer.name,
        bits=layer.bits,
        group_size=-1 if layer.groups == 1 else layer.group_size,
        in_features=layer.in_features,
        out_features=layer.out_features,
        act_order=g_idx is not None and not bool((g_idx == in_order).all()),
        bits_per_weight=8 * stored / (layer.in_features * layer.out_features),
    )
