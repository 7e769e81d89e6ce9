"""`roundwise inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from roundwise.cli.options import JsonOption
from roundwise.cli.output import print_json, print_labelled, print_line, print_note
from roundwise.errors import MAX_QUOTED
from roundwise.system.console import count_of, in_words, stdout, visible
from roundwise.system.memory import format_size

if TYPE_CHECKING:
    from roundwise.checkpoint.engines import ServedLayer
    from roundwise.checkpoint.quantized_layers import QuantizedLayer
    from roundwise.checkpoint.reader import Checkpoint


#: Families with Conv1D layers, whose weights are stored as [in, out].
CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


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
    served_by: dict[str, str | None]
    """Engine -> why it does not serve the checkpoint; None: it does. Empty: it is not quantized."""

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
    from roundwise.model.moe import parse_expert_name

    summary = summarize(checkpoint)
    if as_json:
        print_json(summary.as_dict())
        return
    size = f" {format_size(summary.bytes)}, {count_of(summary.files, 'file')}"
    print_line(size, label=visible(summary.architecture[:MAX_QUOTED]), style="bold")
    settings = summary.quantization or {"quantized": False}
    words = {key.replace("_", " "): in_words(value) for key, value in settings.items()}
    print_labelled(words, width=max(map(len, words)) + 1)
    if summary.layers:
        stdout.print(_layer_table(summary.layers))
    others = count_of(summary.other_tensors, "tensor")
    print_line(f"{others} not quantized ({format_size(summary.other_bytes)})")
    serving = {
        engine: "serves it" if reason is None else f"no: {reason}"
        for engine, reason in summary.served_by.items()
    }
    print_labelled(serving, width=28)
    if serving and any(parse_expert_name(layer.name) for layer in summary.layers):
        print_note(
            "experts count as stored one by one by the model's publisher too; `roundwise plan ORIGINAL` "
            "checks that", label="note:", style="yellow",
        )  # fmt: skip


def _layer_table(layers: list[LayerSummary]) -> Table:
    """Returns a table with one row for all layers that are alike."""
    table = Table(
        "layers", "bits", "group", "in", "out", "act-order", "bits per weight", box=SIMPLE_HEAD
    )
    alike = Counter(
        (
            layer.bits, layer.group_size, layer.in_features, layer.out_features, layer.act_order,
            round(layer.bits_per_weight, 3),
        )
        for layer in layers
    )  # fmt: skip
    for values, count in alike.items():
        table.add_row(str(count), *map(in_words, values))
    return table


def summarize(name: str) -> CheckpointSummary:
    """Returns what is in a checkpoint; reads headers, scales, zero points and g_idx, but no codes.

    Args:
        name: folder, or id on the Hugging Face hub.
    """
    from roundwise.checkpoint.engines import served_by
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
        served_by=(
            served_by(_served_layers(found, layers, str(checkpoint.config.get("model_type"))))
            if found
            else {}
        ),
    )


def _served_layers(
    found: list[QuantizedLayer], summaries: list[LayerSummary], family: str
) -> Iterator[ServedLayer]:
    """Yields the settings of each quantized layer as engines see them, conflicts between layers too.

    Experts count as those of a family whose own files have one tensor for each: which family has not,
    only `plan` finds out, from the original.

    Args:
        found: the quantized layers.
        summaries: what is known of each.
        family: `model_type` of the model.
    """
    from roundwise.checkpoint.engines import (
        ServedLayer,
        conflicting_packed_modules,
        expert_naming,
    )
    from roundwise.model.moe import parse_expert_name

    served: dict[str, ServedLayer] = {}
    experts: dict[str, set[ServedLayer]] = {}
    for layer, summary in zip(found, summaries, strict=True):
        settings = ServedLayer(
            bits=layer.bits, group_size=summary.group_size, sym=layer.config.sym is not False,
            desc_act=summary.act_order, format=layer.checkpoint_format,
            is_head=layer.name.endswith("head"), is_conv1d=family in CONV1D_FAMILIES,
        )  # fmt: skip
        expert = parse_expert_name(layer.name)
        if expert is not None:
            experts.setdefault(expert[0], set()).add(settings)
            settings = replace(settings, expert_naming=expert_naming(expert[1][1], fused=False))
        served[layer.name] = settings
    yield from served.values()
    last = [*served.values()][-1]
    yield from (
        replace(last, conflicting_module=module)
        for module in conflicting_packed_modules(served.__getitem__, served)
    )
    yield from (
        replace(last, expert_naming="mixed") for kinds in experts.values() if len(kinds) > 1
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
