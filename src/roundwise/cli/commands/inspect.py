"""`roundwise inspect`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer
from rich.table import Table

from roundwise.cli.progress import JsonOption, print_json, stdout
from roundwise.system.memory import format_size


def command(
    checkpoint: Annotated[str, typer.Argument(help="Folder, or id on the Hugging Face hub.")],
    as_json: JsonOption = False,
) -> None:
    """Show what is in a checkpoint, without loading it."""
    found = describe(checkpoint)
    if as_json:
        print_json(found)
        return
    stdout.print(
        f"[bold]{found['architecture']}[/]  {format_size(found['bytes'])}, {found['files']} files"
    )
    for key, value in (found["quantization"] or {"quantized": "no"}).items():
        stdout.print(f"  {key}: {value}", highlight=False)
    table = Table("layers", "bits", "group", "in", "out", "act-order", "bits per weight")
    columns = ("bits", "group_size", "in_features", "out_features", "act_order")
    kinds = Counter(
        (*(layer[column] for column in columns), round(layer["bits_per_weight"], 3))
        for layer in found["layers"]
    )
    for kind, count in kinds.items():
        table.add_row(str(count), *map(str, kind))
    if found["layers"]:
        stdout.print(table)
    stdout.print(
        f"{found['other_tensors']} tensors are not quantized ({format_size(found['other_bytes'])})"
    )


def describe(name: str) -> dict[str, Any]:
    """Layers, widths and sizes of a checkpoint, from its headers and g_idx alone."""
    import torch

    from roundwise.checkpoint.gptq_format import (
        SUFFIXES,
        quantized_layers,
        read_quantization_config,
    )
    from roundwise.checkpoint.hub import local_folder
    from roundwise.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint(local_folder(name))
    layers = []
    for layer in quantized_layers(checkpoint):
        bits, in_features = layer.bits(), layer.in_features()
        groups, out_features = layer.tensors["scales"].shape
        size_of_group = -(-in_features // groups)
        g_idx = layer.tensors["g_idx"].read() if "g_idx" in layer.tensors else None
        trivial = torch.arange(in_features) // size_of_group
        stored = sum(info.nbytes for info in layer.tensors.values())
        layers.append(
            {
                "name": layer.name, "bits": bits,
                "group_size": -1 if groups == 1 else size_of_group,
                "in_features": in_features, "out_features": out_features,
                "act_order": g_idx is not None and not bool((g_idx == trivial).all()),
                "bits_per_weight": 8 * stored / (in_features * out_features),
            }
        )  # fmt: skip
    names = checkpoint.config.get("architectures")
    stems = {layer["name"] for layer in layers}
    others = [
        info
        for tensor, info in checkpoint.tensors.items()
        if not (tensor.rpartition(".")[0] in stems and tensor.rpartition(".")[2] in SUFFIXES)
    ]
    return {
        "checkpoint": str(checkpoint.folder),
        "architecture": str(names[0]) if isinstance(names, list) and names else "unknown",
        "files": len(checkpoint.files),
        "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "quantization": read_quantization_config(checkpoint) if layers else None,
        "layers": layers,
        "other_tensors": len(others),
        "other_bytes": sum(info.nbytes for info in others),
    }
