"""`roundwise eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from roundwise.cli.progress import JsonOption, print_json, stdout, steps


def command(
    model: Annotated[str, typer.Argument(help="Model, quantized or not: folder or hub id.")],
    text: Annotated[
        str | None, typer.Option(help="Text file, python-stdlib, wikitext2, c4 …")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens the model sees at once.")] = 2048,
    stride: Annotated[int, typer.Option(help="Tokens from one window to the next.")] = 512,
    max_tokens: Annotated[
        int | None, typer.Option(help="Only the first tokens of the text.")
    ] = None,
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
    batch_size: Annotated[int, typer.Option(help="Rows that go together.", min=1)] = 4,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure a model: perplexity on a text in sliding windows, tasks through lm-eval, or both."""
    from roundwise.calibration.sources import read_text
    from roundwise.errors import CheckpointError, ConfigError
    from roundwise.evaluation.perplexity import perplexity
    from roundwise.evaluation.tasks import evaluate_tasks
    from roundwise.inference.load import load, parse_dtype
    from roundwise.system.device import parse_device

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if text is None and not names:
        raise ConfigError("nothing to evaluate: give --text FILE, --tasks NAMES, or both")
    content = read_text(text) if text is not None else None
    loaded, tokenizer = load(model, dtype=parse_dtype(dtype), device=parse_device(device))
    if tokenizer is None:
        raise CheckpointError(f"{model} has no tokenizer")
    limit_of_model = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    found: dict[str, Any] = {}
    if content is not None:
        with steps("evaluating") as shown:
            result = perplexity(
                loaded, tokenizer, content, window=min(window, limit_of_model or window),
                stride=stride, max_tokens=max_tokens, batch_size=batch_size, progress=shown.update,
            )  # fmt: skip
        found |= vars(result)
    if names:
        scores = evaluate_tasks(
            loaded, tokenizer, names, include_path=include_path, shots=shots, limit=limit,
            batch_size=batch_size,
        )  # fmt: skip
        found["tasks"] = scores.as_dict()
    if as_json:
        print_json(found)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    if "perplexity" in found:
        stdout.print(
            f"perplexity {found['perplexity']:.4f}  ({found['tokens']} tokens, "
            f"window {found['window']}, stride {found['stride']})",
            highlight=False,
        )
    if "tasks" not in found:
        return
    table = Table("task", "documents", "shots", "metric", "value")
    tasks = found["tasks"]
    for task, metrics in tasks["scores"].items():
        for metric, value in metrics.items():
            if metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr")
            shown = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
            documents, shots = (str(tasks[key].get(task, "")) for key in ("samples", "shots"))
            table.add_row(task, documents, shots, metric, shown)
    stdout.print(table)
