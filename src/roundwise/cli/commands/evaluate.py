"""`roundwise eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from roundwise.cli.options import (
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    IncludePathOption,
    JsonOption,
    LimitOption,
    MaxTokensOption,
    ModelArgument,
    ShotsOption,
    SpecialTokensOption,
    StrideOption,
    TasksOption,
    TextOption,
    WindowOption,
    split_names,
)
from roundwise.cli.output import print_json, print_line
from roundwise.system.console import stdout, steps

if TYPE_CHECKING:
    from roundwise.evaluation.tasks import TaskScores


def command(
    model: ModelArgument,
    text: TextOption = None,
    window: WindowOption = 2048,
    stride: StrideOption = 512,
    max_tokens: MaxTokensOption = None,
    special_tokens: SpecialTokensOption = True,
    tasks: TasksOption = None,
    include_path: IncludePathOption = None,
    shots: ShotsOption = None,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = 4,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure a model: perplexity on a text in sliding windows, tasks through lm-eval, or both."""
    from roundwise.calibration.sources import read_text
    from roundwise.calibration.special_tokens import NO_SPECIAL_TOKENS
    from roundwise.errors import ConfigError
    from roundwise.evaluation.perplexity import perplexity
    from roundwise.evaluation.tasks import evaluate_tasks
    from roundwise.inference.load import load, parse_dtype, require_tokenizer
    from roundwise.model.build import context_length
    from roundwise.system.device import parse_device

    names = split_names(tasks)
    if text is None and not names:
        raise ConfigError("nothing to evaluate: give --text FILE, --tasks NAMES, or both")
    content = read_text(text) if text is not None else None
    loaded, tokenizer = load(model, dtype=parse_dtype(dtype), device=parse_device(device))
    require_tokenizer(tokenizer, model)
    on_text = scores = None
    if content is not None:
        with steps("evaluating") as shown:
            on_text = perplexity(
                loaded, tokenizer, content,
                window=min(window, context_length(loaded) or window), stride=stride,
                max_tokens=max_tokens, batch_size=batch_size,
                special=None if special_tokens else NO_SPECIAL_TOKENS, progress=shown.update,
            )  # fmt: skip
    if names:
        scores = evaluate_tasks(
            loaded, tokenizer, names, include_path=include_path, shots=shots, limit=limit,
            batch_size=batch_size,
        )  # fmt: skip
    if as_json:
        print_json(
            {
                **(vars(on_text) if on_text else {}),
                **({"tasks": scores.as_dict()} if scores else {}),
            }
        )
        return
    if on_text is not None:
        print_line(
            f"perplexity {on_text.perplexity:.4f}  ({on_text.tokens} tokens, "
            f"window {on_text.window}, stride {on_text.stride})"
        )
    if scores is not None:
        print_scores(scores)


def print_scores(scores: TaskScores) -> None:
    """Prints a table of all metrics of all tasks, with their standard errors."""
    table = Table("task", "documents", "shots", "metric", "value")
    for task, metrics in scores.scores.items():
        for metric, value in metrics.items():
            if metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr")
            text = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
            documents, shots = (str(n.get(task, "")) for n in (scores.samples, scores.shots))
            table.add_row(task, documents, shots, metric, text)
    stdout.print(table)
