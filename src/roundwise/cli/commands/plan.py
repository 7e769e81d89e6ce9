"""`roundwise plan`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from roundwise.cli.options import SOURCE, Expand, JsonOption, settings_as_options
from roundwise.cli.output import print_json, print_labelled, print_note
from roundwise.config import CalibrationConfig, QuantizeConfig, RunConfig
from roundwise.system.console import stdout, steps
from roundwise.system.memory import format_size

if TYPE_CHECKING:
    from roundwise.plan.plan import Plan, PlannedLayer


@settings_as_options
def command(
    *,
    model: Annotated[str, SOURCE],
    windows: CalibrationConfig,
    config: QuantizeConfig,
    run: Annotated[
        RunConfig,
        Expand(without=("restart", "strict"), help={"device": "Device to plan for."}),
    ],
    as_json: JsonOption = False,
) -> None:
    """Say what `quantize` would do: modules, sizes, memory, time, who serves the result.

    Reads only config.json and the headers of the weights. Exit code 1: a run would be refused.
    """
    from roundwise.model.rotate import open_for_run
    from roundwise.plan.plan import plan
    from roundwise.system.device import parse_device
    from roundwise.system.hub import local_folder
    from roundwise.system.memory import parse_size

    with steps("opening the model", lines=False) as shown:
        # Unchecked: that would read all weights, and the plan needs only names and shapes.
        streamed = open_for_run(local_folder(model), config, parse_device(run.device), check=False)
        shown.stage("measuring this machine")
        planned = plan(
            streamed, config,
            samples=windows.samples, seq_len=windows.seq_len, batch_size=windows.batch_size,
            mode=run.mode, budget=parse_size(run.max_memory),
        )  # fmt: skip
    if as_json:
        print_json(planned.as_dict())
    else:
        _print_plan(planned)
    if planned.problems:
        raise typer.Exit(1)


def _print_plan(planned: Plan) -> None:
    table = Table("modules", "", "out x in", "bits", "group", "shares input with", box=SIMPLE_HEAD)
    for column in table.columns[:-1]:
        column.no_wrap = True  # above all the name, which --override needs
    for name, module, count in _group_alike(planned.modules):
        rows, columns = module.shape
        leader = (
            _star_block(module.shares_input_with or "")
            if module.shares_input_with != module.name
            else ""
        )
        table.add_row(
            name, f"{count}x", f"{rows} x {columns}", str(module.bits or "-"),
            str(module.group_size or ""), "" if leader == name else leader.rpartition(".")[2],
        )  # fmt: skip
    stdout.print(table)
    print_labelled(_summary(planned), width=28)
    for warning in planned.warnings:
        print_note(warning, label="warning:", style="yellow")
    for problem in planned.problems[:5]:
        print_note(problem, label="would be refused:", style="bold red")


def _summary(planned: Plan) -> dict[str, str]:
    """Returns the lines below the table: label -> text."""
    memory = planned.memory
    parts = sorted(memory.parts.items(), key=lambda part: -part[1])
    seconds = sum(planned.phases.values())
    lines = {
        "size": f"{format_size(planned.bytes_before)} -> {format_size(planned.bytes_after)} "
        f"({planned.bits_per_weight:.2f} bits per quantized weight)",
        **({"source": ", ".join(planned.sources)} if planned.sources else {}),
        "quantized": f"{planned.quantized_part:.1%} of all parameters",
        "peak memory": f"{format_size(memory.peak_bytes)} on {memory.device} in mode {memory.mode}"
        + (", activations offloaded: " if memory.offloaded else ": ")
        + ", ".join(f"{name} {format_size(value)}" for name, value in parts[:4]),
        "disk": f"{format_size(sum(planned.disk.values()))} in the output folder: "
        + ", ".join(f"{name} {format_size(value)}" for name, value in planned.disk.items()),
        "time": f"about {_format_duration(seconds)} on {memory.device} "
        "(estimated from a short trial on this machine)",
    }
    for engine, reason in planned.served_by.items():
        lines[engine] = "serves it" if reason is None else f"no: {reason}"
    degrees = planned.tensor_parallel
    lines["tensor parallel"] = (
        ", ".join(map(str, degrees)) if any(n > 1 for n in degrees) else "cannot be split over GPUs"
    )
    if planned.tied_embeddings:
        lines["embeddings"] = "tied to the output head; neither is quantized"
    return lines


def _group_alike(modules: list[PlannedLayer]) -> list[tuple[str, PlannedLayer, int]]:
    """Returns one row for all modules that differ only in the number of their block.

    Each is the name with a star for the block, the first of these modules, and their count.
    """
    alike: dict[tuple[object, ...], list[PlannedLayer]] = {}
    for module in modules:
        key = (_star_block(module.name), module.shape, module.bits, module.group_size)
        alike.setdefault(key, []).append(module)
    return [(str(key[0]), same[0], len(same)) for key, same in alike.items()]


def _star_block(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _format_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
