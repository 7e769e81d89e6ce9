"""`roundwise report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from roundwise.cli.progress import JsonOption, console, print_json, stdout, steps
from roundwise.system.memory import format_size


def command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that `roundwise quantize` made.")],
    against: Annotated[
        str | None, typer.Option(help="The original, for --text and --prompt: folder or hub id.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Held-out text: also perplexity and KL, beside rounding to nearest."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Also how both models go on from it; several at once.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens the model sees at once.", min=2)] = 2048,
    stride: Annotated[
        int, typer.Option(help="Tokens from one window to the next, for perplexity.", min=1)
    ] = 512,
    max_tokens: Annotated[int, typer.Option(help="Only the first tokens of the text.")] = 50_000,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write (default: roundwise-report.html in the folder)."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that go together.", min=1)] = 4,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write a page about a run: what it made, what it lost, what it took; one file, no network.

    `quantize` writes it too; with --against, --text and --prompt it also says what was lost.
    """
    from roundwise.cli.commands.compare import evaluation_tokens, fitting_window
    from roundwise.errors import ConfigError
    from roundwise.evaluation.compare import Protocol
    from roundwise.evaluation.report.facts import read_facts
    from roundwise.evaluation.report.measure import answers, evaluate
    from roundwise.evaluation.report.page import write_report
    from roundwise.inference.load import parse_dtype
    from roundwise.system.device import parse_device

    prompts, evaluation, found = prompt or [], None, []
    if (text is not None or prompts) and against is None:
        raise ConfigError("--text and --prompt need the original: --against MODEL")
    read_facts(checkpoint)  # what is no run of ours is refused before anything is measured
    type_, place = parse_dtype(dtype), str(parse_device(device))
    if against is not None and text is not None:
        protocol = Protocol(
            ids=evaluation_tokens(against, text, max_tokens), window=fitting_window(against, window),
            stride=stride, batch_size=batch_size, speed=False, dtype=type_, device=place,
        )  # fmt: skip
        with steps("comparing") as shown:
            evaluation = evaluate(
                against, checkpoint, protocol, Path(text).name,
                progress=lambda what, done: shown.update(done, what),
            )  # fmt: skip
    if against is not None:
        found = answers(against, checkpoint, prompts, dtype=type_, device=place)
    path = write_report(checkpoint, output, evaluation=evaluation, answers=found)
    if as_json:
        print_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        stdout.print(
            f"{path} ({format_size(path.stat().st_size)})", highlight=False, soft_wrap=True
        )


def after_run(out: Path) -> Path | None:
    """Draws the report of a run that has just finished; where that fails, the run has not failed."""
    from roundwise.evaluation.report.page import write_report

    try:
        return write_report(out)
    except Exception as error:  # a run's result is safe by now: nothing about a page may fail it
        console.print(
            f"[yellow]note:[/] no report was written ({type(error).__name__}: {error}); "
            f"`roundwise report {out}` tries again",
            highlight=False, soft_wrap=True, markup=True,
        )  # fmt: skip
        return None
