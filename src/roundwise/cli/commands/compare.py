"""`roundwise compare`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from roundwise.cli.options import (
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    IncludePathOption,
    JsonOption,
    LimitOption,
    MaxTokensOption,
    ShotsOption,
    SpecialTokensOption,
    StrideOption,
    TasksOption,
    TextOption,
    WindowOption,
    split_names,
)
from roundwise.cli.output import print_json, print_line, print_note
from roundwise.system.console import stdout, steps
from roundwise.system.memory import format_size

if TYPE_CHECKING:
    from roundwise.calibration.special_tokens import SpecialTokens
    from roundwise.evaluation.compare import Comparison


def command(
    model: Annotated[str, typer.Argument(help="Original model: folder or Hugging Face hub id.")],
    quantized: Annotated[
        list[str], typer.Argument(help="Checkpoints made from it; several can be compared at once.")
    ],
    text: TextOption = None,
    window: WindowOption = 2048,
    stride: StrideOption = 512,
    max_tokens: MaxTokensOption = 50_000,
    special_tokens: SpecialTokensOption = True,
    tasks: TasksOption = None,
    include_path: IncludePathOption = None,
    shots: ShotsOption = None,
    limit: LimitOption = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Another model to compare: rtn, the original rounded to nearest with the settings of "
            "the first quantized model."
        ),
    ] = None,
    speed: Annotated[
        bool,
        typer.Option("--speed/--no-speed", help="Also measure speed, loading time and memory."),
    ] = True,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(help="Exit code 1 if perplexity rises by more than this.", min=0)
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Exit code 1 if KL per token is more than this.", min=0)
    ] = None,
    batch_size: BatchSizeOption = 4,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compare quantized models with their original: accuracy, size, speed, and a verdict.

    Measures perplexity in sliding windows, KL divergence and top-1 agreement per token,
    tasks through lm-eval, size, speed and memory.
    With --max-perplexity-increase or --max-kl the exit code says pass or fail.
    """
    from roundwise.errors import ConfigError
    from roundwise.evaluation.compare import Protocol, compare, round_to_nearest_like
    from roundwise.inference.load import parse_dtype
    from roundwise.system.device import parse_device

    if baseline not in (None, "rtn"):
        raise ConfigError(f"--baseline {baseline!r} is not supported: use rtn")
    if text is None and (max_kl is not None or max_perplexity_increase is not None):
        raise ConfigError("--max-kl and --max-perplexity-increase need a text: --text FILE")
    ids, special = evaluation_tokens(model, text, max_tokens, special=special_tokens)
    protocol = Protocol(
        ids=ids, special=special, window=fitting_window(model, window), stride=stride,
        batch_size=batch_size, tasks=split_names(tasks), include_path=include_path, shots=shots,
        limit=limit, speed=speed, dtype=parse_dtype(dtype), device=str(parse_device(device)),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, steps("comparing") as shown:
        folders: list[str | os.PathLike[str]] = list(quantized)
        if baseline is not None:
            rounded = Path(scratch) / "rtn"
            round_to_nearest_like(model, quantized[0], rounded)
            folders.append(rounded)
        comparisons = compare(model, folders, protocol, progress=shown.stage)
    failed = [
        reason
        for comparison in comparisons[: len(quantized)]
        for reason in _broken_limits(comparison, max_perplexity_increase, max_kl)
    ]
    if as_json:
        models = [comparison.as_dict() for comparison in comparisons]
        print_json(
            {**(models[0] if len(quantized) == 1 else {}), "models": models, "failed": failed}
        )
    else:
        _print_table(comparisons)
        for reason in failed:
            print_note(reason, label="failed:", style="bold red")
    if failed:
        raise typer.Exit(1)


def evaluation_tokens(
    model: str, text: str | None, max_tokens: int | None, *, special: bool
) -> tuple[list[int], SpecialTokens]:
    """Returns the first tokens of a text, and the special tokens to put around every window.

    Args:
        model: the original model, whose tokenizer is used.
        text: source of the text; None: no text, no tokens.
        max_tokens: tokens of the text to use; None: all.
        special: False: no special tokens.
    """
    from roundwise.calibration.sources import read_text
    from roundwise.calibration.special_tokens import NO_SPECIAL_TOKENS, special_tokens
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.model.tokenizer import load_tokenizer
    from roundwise.system.hub import local_folder

    if text is None:
        return [], NO_SPECIAL_TOKENS
    tokenizer = load_tokenizer(Checkpoint(local_folder(model)))
    ids = tokenizer(read_text(text), add_special_tokens=False, verbose=False)["input_ids"]
    around = special_tokens(tokenizer) if special else NO_SPECIAL_TOKENS
    return list(ids[:max_tokens]), around


def fitting_window(model: str, window: int) -> int:
    """Returns `window`, or the longest text that the model takes if that is less."""
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.model.build import context_length, load_config
    from roundwise.system.hub import local_folder

    config = load_config(Checkpoint(local_folder(model)))
    return min(window, context_length(config) or window)


def _broken_limits(
    comparison: Comparison, max_perplexity_increase: float | None, max_kl: float | None
) -> list[str]:
    """Returns one sentence per limit that a model exceeds."""
    reasons = []
    if comparison.perplexity is not None and max_perplexity_increase is not None:
        rise = comparison.perplexity[1] - comparison.perplexity[0]
        if rise > max_perplexity_increase:
            reasons.append(
                f"{comparison.name}: perplexity rises by {rise:.4g}, more than "
                f"{max_perplexity_increase:g}"
            )
    kl = comparison.kl_divergence
    if kl is not None and max_kl is not None and kl > max_kl:
        reasons.append(f"{comparison.name}: KL is {kl:.4g}, more than {max_kl:g}")
    return reasons


def _print_table(comparisons: list[Comparison]) -> None:
    first = comparisons[0]
    table = Table("", "original", *(each.name for each in comparisons))
    if first.perplexity is not None:
        _add_text_rows(table, first.perplexity[0], comparisons)
    for index, change in enumerate(first.tasks):
        others = [each.tasks[index] for each in comparisons]
        table.add_row(
            f"{change.task} ({change.metric})", f"{change.base:.4f}",
            *(f"{c.quantized:.4f} ({c.points:+.1f}{' !' if c.flagged else ''})" for c in others),
        )  # fmt: skip
    table.add_row(
        "size", format_size(first.bytes[0]), *(format_size(each.bytes[1]) for each in comparisons)
    )
    for row in _speed_rows(comparisons):
        table.add_row(*row)
    table.add_row("[bold]verdict", "", *(f"[bold]{each.verdict.name}" for each in comparisons))
    stdout.print(table)
    for each in comparisons:
        if each.verdict.reasons:
            print_line(f"{each.name}: {each.verdict}")
        if each.verdict.lost_too_much and each.advice:
            print_line(f"{each.name}: {each.advice}")
        for warning in each.warnings:
            print_note(f"{each.name}: {warning}")


def _add_text_rows(table: Table, perplexity: float, comparisons: list[Comparison]) -> None:
    """Adds what was measured on the text; `perplexity` is the original's."""
    table.add_row(
        "perplexity", f"{perplexity:.4f}",
        *(f"{each.perplexity[1]:.4f}" for each in comparisons if each.perplexity),
    )  # fmt: skip
    table.add_row("KL per token", "0", *(f"{each.kl_divergence:.5f}" for each in comparisons))
    table.add_row(
        "top-1 agreement", "100%", *(f"{each.top1_agreement:.2%}" for each in comparisons)
    )
    ends = [(each.kl_by_position[0][1], each.kl_by_position[-1][1]) for each in comparisons]
    table.add_row(
        "KL, start … end of window", "", *(f"{start:.5f} … {end:.5f}" for start, end in ends)
    )


def _speed_rows(comparisons: list[Comparison]) -> Iterator[list[str]]:
    """Yields rows of label, original and each quantized model, if speed was measured."""
    pairs = [each.speed for each in comparisons if each.speed is not None]
    if not pairs:
        return
    for key, label, show in (
        ("prompt_tokens_per_second", "prompt, tokens/s", "{:.1f}".format),
        ("generation_tokens_per_second", "generation, tokens/s", "{:.1f}".format),
        ("load_seconds", "loading, s", "{:.2f}".format),
        ("peak_rss_bytes", "peak memory", lambda nbytes: format_size(int(nbytes))),
    ):
        yield [
            label,
            *(show(getattr(values, key)) for values in (pairs[0][0], *(p[1] for p in pairs))),
        ]
