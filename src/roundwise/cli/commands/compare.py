"""`roundwise compare`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from roundwise.cli.progress import JsonOption, console, print_json, stdout, steps
from roundwise.system.memory import format_size

if TYPE_CHECKING:
    from roundwise.evaluation.compare import Compared


def command(
    model: Annotated[str, typer.Argument(help="The original: folder or hub id.")],
    quantized: Annotated[list[str], typer.Argument(help="What was made of it; several at once.")],
    text: Annotated[
        str | None, typer.Option(help="Text file, python-stdlib, wikitext2, c4 …")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens the model sees at once.", min=2)] = 2048,
    stride: Annotated[
        int, typer.Option(help="Tokens from one window to the next, for perplexity.", min=1)
    ] = 512,
    max_tokens: Annotated[int, typer.Option(help="Only the first tokens of the text.")] = 50_000,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval: arc_easy,hellaswag …")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with task files (YAML) of your own.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples before each question (default: the task's).", min=0)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first documents of each task.", min=1)
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="rtn: also the original rounded to nearest, with the first one's settings."
        ),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure speed, loading and memory too.")
    ] = True,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(help="Exit with 1 where perplexity rises by more.", min=0)
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Exit with 1 where KL per token is more.", min=0)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that go together.", min=1)] = 4,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compare quantized models with their original: what was lost, what was won, and a verdict.

    Perplexity in sliding windows, KL divergence and top-1 agreement per token, tasks through lm-eval,
    size, speed and memory. With --max-perplexity-increase or --max-kl the exit code says pass or fail.
    """
    from roundwise.errors import ConfigError
    from roundwise.evaluation.compare import Protocol, compare, round_to_nearest_like
    from roundwise.inference.load import parse_dtype
    from roundwise.system.device import parse_device

    if baseline not in (None, "rtn"):
        raise ConfigError(f"--baseline {baseline!r} is not known: use rtn")
    if text is None and (max_kl is not None or max_perplexity_increase is not None):
        raise ConfigError("--max-kl and --max-perplexity-increase need a text: --text FILE")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    protocol = Protocol(
        ids=evaluation_tokens(model, text, max_tokens) if text is not None else [],
        window=fitting_window(model, window), stride=stride, batch_size=batch_size, tasks=names,
        include_path=include_path, shots=shots, limit=limit, speed=speed,
        dtype=parse_dtype(dtype), device=str(parse_device(device)),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, steps("comparing") as shown:
        folders: list[Any] = list(quantized)
        if baseline is not None:
            folders.append(Path(scratch) / "rtn")
            round_to_nearest_like(model, quantized[0], folders[-1])
        found = compare(
            model, folders, protocol, progress=lambda what, done: shown.update(done, what)
        )
    failed = [
        reason
        for one in found[: len(quantized)]
        for reason in _beyond(one, max_perplexity_increase, max_kl)
    ]
    if as_json:
        models = [one.as_dict() for one in found]
        print_json(
            {**(models[0] if len(quantized) == 1 else {}), "models": models, "failed": failed}
        )
    else:
        _print(found)
        for reason in failed:
            console.print(f"[bold red]failed:[/] {reason}", highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def evaluation_tokens(model: str, text: str, most: int) -> list[int]:
    """The first tokens of a text, by the original's tokenizer."""
    from roundwise.calibration.sources import read_text
    from roundwise.checkpoint.hub import local_folder
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.run.prepare import load_tokenizer

    tokenizer = load_tokenizer(Checkpoint(local_folder(model)))
    ids = tokenizer(read_text(text), add_special_tokens=False, verbose=False)["input_ids"]
    return list(ids[:most])


def fitting_window(model: str, wanted: int) -> int:
    """No more than the model's context."""
    from roundwise.checkpoint.hub import local_folder
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.model.build import load_config

    config = load_config(Checkpoint(local_folder(model))).get_text_config()
    return min(wanted, getattr(config, "max_position_embeddings", None) or wanted)


def _beyond(one: Compared, most_perplexity: float | None, most_kl: float | None) -> list[str]:
    """Which limits a model breaks, in words."""
    found = []
    if one.perplexity is not None and most_perplexity is not None:
        rise = one.perplexity[1] - one.perplexity[0]
        if rise > most_perplexity:
            found.append(
                f"{one.name}: perplexity rises by {rise:.4g}, more than {most_perplexity:g}"
            )
    if one.kl_divergence is not None and most_kl is not None and one.kl_divergence > most_kl:
        found.append(f"{one.name}: KL is {one.kl_divergence:.4g}, more than {most_kl:g}")
    return found


def _print(found: list[Compared]) -> None:
    table = Table("", "original", *(one.name for one in found))
    first = found[0]
    if first.perplexity is not None:
        table.add_row(
            "perplexity", f"{first.perplexity[0]:.4f}",
            *(f"{one.perplexity[1]:.4f}" for one in found if one.perplexity),
        )  # fmt: skip
        table.add_row("KL per token", "0", *(f"{one.kl_divergence:.5f}" for one in found))
        table.add_row("top-1 agreement", "100%", *(f"{one.top1_agreement:.2%}" for one in found))
        table.add_row(
            "KL, begin … end of window", "",
            *(f"{one.kl_by_position[0][1]:.5f} … {one.kl_by_position[-1][1]:.5f}" for one in found),
        )  # fmt: skip
    for index, change in enumerate(first.tasks):
        others = [one.tasks[index] for one in found]
        table.add_row(
            f"{change.task} ({change.metric})", f"{change.base:.4f}",
            *(f"{c.quantized:.4f} ({c.points:+.1f}{' !' if c.flagged else ''})" for c in others),
        )  # fmt: skip
    table.add_row(
        "size", format_size(first.bytes[0]), *(format_size(one.bytes[1]) for one in found)
    )
    for key, label, shown in (
        ("prompt_tokens_per_second", "prompt, tokens/s", "{:.1f}"),
        ("generation_tokens_per_second", "generation, tokens/s", "{:.1f}"),
        ("load_seconds", "loading, s", "{:.2f}"),
        ("peak_rss_bytes", "peak memory", "size"),
    ):
        pairs = [one.speed for one in found if one.speed is not None]
        if pairs:
            values = [pairs[0][0][key], *(pair[1][key] for pair in pairs)]
            cells = [format_size(int(v)) if shown == "size" else shown.format(v) for v in values]
            table.add_row(label, *cells)
    table.add_row("[bold]verdict", "", *(f"[bold]{one.verdict}" for one in found))
    stdout.print(table)
    for one in found:
        for warning in one.warnings:
            console.print(f"{one.name}: {warning}", highlight=False, soft_wrap=True)
