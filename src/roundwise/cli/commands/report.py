"""`roundwise report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from roundwise.cli.evaluation_text import evaluation_tokens, fitting_window
from roundwise.cli.options import (
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxTokensOption,
    SpecialTokensOption,
    StrideOption,
    WindowOption,
)
from roundwise.cli.output import print_json, print_line
from roundwise.system.console import steps
from roundwise.system.memory import format_size


def command(
    checkpoint: Annotated[Path, typer.Argument(help="Output folder of `roundwise quantize`.")],
    against: Annotated[
        str | None,
        typer.Option(
            help="Original model, for --text and --prompt: folder or Hugging Face hub id."
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Held-out text to measure perplexity and KL on, also of plain rounding to nearest."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt that both models continue in the report; can be repeated."),
    ] = None,
    window: WindowOption = 2048,
    stride: StrideOption = 512,
    max_tokens: MaxTokensOption = 50_000,
    special_tokens: SpecialTokensOption = True,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write (default: roundwise-report.html in the folder)."),
    ] = None,
    batch_size: BatchSizeOption = 4,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write a report of a run: one HTML file about its result, accuracy, time and memory.

    `quantize` writes it too; --against, --text and --prompt add what was lost.
    The page loads nothing from the network.
    """
    from roundwise.errors import ConfigError
    from roundwise.evaluation.compare import Protocol
    from roundwise.evaluation.report.facts import read_facts
    from roundwise.evaluation.report.measure import evaluate, generate_answers
    from roundwise.evaluation.report.page import write_report
    from roundwise.inference.load import parse_dtype
    from roundwise.system.device import parse_device

    prompts, evaluation, continuations = prompt or [], None, []
    if (text is not None or prompts) and against is None:
        raise ConfigError("--text and --prompt need the original model: --against MODEL")
    read_facts(checkpoint)  # refuses other folders before anything is measured
    torch_dtype, place = parse_dtype(dtype), str(parse_device(device))
    if against is not None and text is not None:
        ids, special = evaluation_tokens(against, text, max_tokens, special=special_tokens)
        protocol = Protocol(
            ids=ids, special=special, window=fitting_window(against, window), stride=stride,
            batch_size=batch_size, speed=False, dtype=torch_dtype, device=place,
        )  # fmt: skip
        with steps("comparing") as shown:
            evaluation = evaluate(
                against, checkpoint, protocol, Path(text).name,
                progress=shown.stage,
            )  # fmt: skip
    if against is not None:
        continuations = generate_answers(
            against, checkpoint, prompts, dtype=torch_dtype, device=place
        )
    path = write_report(checkpoint, output, evaluation=evaluation, answers=continuations)
    if as_json:
        print_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        print_line(f"{path} ({format_size(path.stat().st_size)})")
