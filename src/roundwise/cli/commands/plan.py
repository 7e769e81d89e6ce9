"""`roundwise plan`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from roundwise.cli.commands.quantize import number, parse_dynamic
from roundwise.cli.progress import JsonOption, console, print_json, stdout
from roundwise.system.memory import format_size

if TYPE_CHECKING:
    from roundwise.plan.plan import Plan, PlannedLayer


def command(
    model: Annotated[str, typer.Argument(help="Model folder, or id on the Hugging Face hub.")],
    bits: Annotated[int, typer.Option(help="Width of a weight: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Input channels that share a scale; -1: all of them.")
    ] = 128,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Fixed or searched zero point.")] = True,
    desc_act: Annotated[
        bool, typer.Option("--desc-act", help="Act-order in the file (few servers take it).")
    ] = False,
    recipe: Annotated[str, typer.Option(help="best, or textbook: GPTQ as published.")] = "best",
    target_bpw: Annotated[
        float | None, typer.Option(help="Bits per weight, each layer's chosen when the run begins.")
    ] = None,
    target_widths: Annotated[
        str, typer.Option(help="Widths that --target-bpw chooses from.")
    ] = "2,3,4,8",
    method: Annotated[str, typer.Option(help="gptq, awq, or rtn.")] = "gptq",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward.")] = 8,
    experts: Annotated[
        str, typer.Option(help="Calibration tokens of an expert: routed or all.")
    ] = "routed",
    lm_head: Annotated[
        bool, typer.Option("--lm-head", help="Quantize the output head too.")
    ] = False,
    override: Annotated[
        list[str] | None, typer.Option(help="'REGEX=bits:8,group_size:32' for some modules.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Regex of modules to leave as they are.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="true_sequential or block; chosen by memory if not given.")
    ] = None,
    max_memory: Annotated[str | None, typer.Option(help="Budget, such as 8GB.")] = None,
    device: Annotated[str, typer.Option(help="That is to compute: auto, cpu, cuda …")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say what `quantize` would do: modules, sizes, memory, time, who serves the result.

    Reads config.json and the headers of the weights only. Exit code 1: a run would be refused.
    """
    from roundwise.checkpoint.hub import local_folder
    from roundwise.config import QuantizeConfig
    from roundwise.model.streamed import open_streamed_model
    from roundwise.plan.plan import plan
    from roundwise.system.device import parse_device
    from roundwise.system.memory import parse_mode, parse_size

    config = QuantizeConfig(
        bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, recipe=recipe, method=method,
        experts=experts, lm_head=lm_head, target_bpw=target_bpw,
        target_widths=tuple(number(bits) for bits in target_widths.split(",")),
        dynamic=parse_dynamic(override or [], skip or []),
    )  # fmt: skip
    found = plan(
        open_streamed_model(local_folder(model), lm_head=lm_head, device=parse_device(device)), config,
        samples=samples, seq_len=seq_len, batch_size=batch_size,
        mode=parse_mode(mode), budget=parse_size(max_memory),
    )  # fmt: skip
    if as_json:
        print_json(found.as_dict())
    else:
        _print(found)
    if found.problems:
        raise typer.Exit(1)


def _print(found: Plan) -> None:
    table = Table("modules", "", "out x in", "bits", "group", "input of", box=SIMPLE_HEAD)
    table.columns[0].no_wrap = True  # the name is what --override wants
    for name, module, count in _collapsed(found.modules):
        rows, columns = module.shape
        leader = _star(module.shares or "") if module.shares != module.name else ""
        table.add_row(
            name, f"{count}x", f"{rows} x {columns}", str(module.bits or "as it is"),
            str(module.group_size or ""), "" if leader == name else leader.rpartition(".")[2],
        )  # fmt: skip
    stdout.print(table)
    memory = found.memory
    parts = sorted(memory.parts.items(), key=lambda part: -part[1])
    seconds = sum(found.phases.values())
    lines = {
        "size": f"{format_size(found.bytes_before)} -> {format_size(found.bytes_after)} "
        f"({found.bits_per_weight:.2f} bits per quantized weight)",
        "quantized": f"{found.quantized_part:.1%} of all parameters",
        "peak memory": f"{format_size(memory.peak_bytes)} on {memory.device} in mode {memory.mode}"
        + (", batches wait elsewhere: " if memory.offloaded else ": ")
        + ", ".join(f"{name} {format_size(value)}" for name, value in parts[:4]),
        "disk": f"{format_size(sum(found.disk.values()))} in the output folder: "
        + ", ".join(f"{name} {format_size(value)}" for name, value in found.disk.items()),
        "time": f"about {_duration(seconds)} on {memory.device} (estimated from a short trial here)",
    }
    for engine, reason in found.served_by.items():
        lines[engine] = "serves it" if reason is None else f"no: {reason}"
    lines["tensor parallel"] = ", ".join(map(str, found.tensor_parallel)) or "none"
    if found.tied_embeddings:
        lines["embeddings"] = "tied to the head; both stay as they are"
    for label, text in lines.items():
        stdout.print(f"{label:28} {text}", highlight=False, soft_wrap=True)
    for warning in found.warnings:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False, soft_wrap=True)
    for problem in found.problems[:5]:
        console.print(f"[bold red]would be refused:[/] {problem}", highlight=False, soft_wrap=True)


def _collapsed(modules: list[PlannedLayer]) -> list[tuple[str, PlannedLayer, int]]:
    """Modules that differ in nothing but the number of their block, as one, with how many there are."""
    found: dict[tuple[object, ...], list[PlannedLayer]] = {}
    for module in modules:
        key = (_star(module.name), module.shape, module.bits, module.group_size)
        found.setdefault(key, []).append(module)
    return [(str(key[0]), same[0], len(same)) for key, same in found.items()]


def _star(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
