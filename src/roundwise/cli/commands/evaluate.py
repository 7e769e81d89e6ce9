"""`roundwise eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from roundwise.cli.evaluation_text import evaluation_tokens, fitting_window
from roundwise.cli.options import (
    ApiKeyOption,
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    EndpointOption,
    IncludePathOption,
    JsonOption,
    LimitOption,
    MaxTokensOption,
    ServedModelArgument,
    ShotsOption,
    SpecialTokensOption,
    StrideOption,
    TasksOption,
    TextOption,
    WindowOption,
    split_names,
)
from roundwise.cli.output import print_json, print_line
from roundwise.system.console import count_of, stdout, steps

if TYPE_CHECKING:
    from roundwise.evaluation.endpoint.client import Endpoint
    from roundwise.evaluation.endpoint.measure import ServedPerplexity
    from roundwise.evaluation.perplexity import Perplexity
    from roundwise.evaluation.tasks import TaskScores


def command(
    model: ServedModelArgument = None,
    endpoint: EndpointOption = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="With --endpoint: model to compare the served one with, such as its original."
        ),
    ] = None,
    api_key: ApiKeyOption = None,
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
    """Measure a model: perplexity on a text in sliding windows, tasks through lm-eval, or both.

    With --endpoint, the perplexity through the server that serves the model, and with --against its
    divergence from another model.
    """
    from roundwise.calibration.sources import read_text
    from roundwise.calibration.special_tokens import NO_SPECIAL_TOKENS
    from roundwise.errors import ConfigError
    from roundwise.evaluation.endpoint.client import Endpoint, served_model
    from roundwise.evaluation.perplexity import perplexity
    from roundwise.evaluation.tasks import evaluate_tasks
    from roundwise.inference.load import load, parse_dtype, require_tokenizer
    from roundwise.model.build import context_length
    from roundwise.system.device import parse_device

    names = split_names(tasks)
    if text is None and not names:
        raise ConfigError("nothing to evaluate: give --text FILE, --tasks NAMES, or both")
    if endpoint is not None:
        if names or text is None:
            raise ConfigError(
                "--endpoint measures a text (--text FILE); for tasks of a server, use lm-eval's own "
                "--model local-completions"
            )
        server = Endpoint(endpoint, api_key=api_key)
        result = _measure_served(
            server, served_model(server, model), text,
            window=window, stride=stride, max_tokens=max_tokens, special=special_tokens,
            parallel=batch_size, against=against, dtype=dtype, device=device,
        )  # fmt: skip
        _print_served(result, as_json=as_json)
        return
    if model is None or against is not None:
        raise ConfigError("name the model to measure; --against needs --endpoint")
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
    _print(on_text, scores, as_json=as_json)


def _print(on_text: Perplexity | None, scores: TaskScores | None, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                **(vars(on_text) if on_text else {}),
                **({"tasks": scores.as_dict()} if scores else {}),
            }
        )
        return
    if on_text is not None:
        _print_perplexity(on_text)
    if scores is not None:
        print_scores(scores)


def _print_perplexity(result: Perplexity | ServedPerplexity) -> None:
    print_line(
        f"perplexity {result.perplexity:.4f}  ({count_of(result.tokens, 'token')}, window "
        f"{result.window}, stride {result.stride})"
    )


def _measure_served(
    server: Endpoint,
    model: str,
    text: str,
    *,
    window: int,
    stride: int,
    max_tokens: int | None,
    special: bool,
    parallel: int,
    against: str | None,
    dtype: str,
    device: str,
) -> ServedPerplexity:
    """Measures the model of a server.

    Args:
        server: the server.
        model: the checkpoint that it serves, whose tokenizer is used.
        text: source of the text.
        window, stride, max_tokens, special: as for the command.
        parallel: windows that are requested at the same time.
        against: model to compare with; None: none.
        dtype, device: of that model.
    """
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.evaluation.endpoint.measure import Reference, served_perplexity
    from roundwise.evaluation.perplexity import cut_windows
    from roundwise.inference.load import load, parse_dtype
    from roundwise.model.tokenizer import load_tokenizer
    from roundwise.system.device import parse_device
    from roundwise.system.hub import local_folder

    ids, around = evaluation_tokens(model, text, max_tokens, special=special)
    window = fitting_window(model, window)
    if server.context is not None:  # servers want room for a generated token
        window = min(window, server.context - 1)
    windows = cut_windows(ids, window, stride, around)
    reference = None
    if against is not None:
        loaded, _ = load(against, dtype=parse_dtype(dtype), device=parse_device(device))
        reference = Reference(against, loaded)
    with steps(f"evaluating {server.model}") as shown:
        return served_perplexity(
            server, load_tokenizer(Checkpoint(local_folder(model))), windows,
            parallel=parallel, against=reference, progress=shown.update,
        )  # fmt: skip


def _print_served(result: ServedPerplexity, *, as_json: bool) -> None:
    if as_json:
        print_json(result.as_dict())
        return
    _print_perplexity(result)
    print_line(f"served as {result.model} by {result.endpoint}, scored by {result.scored_by}")
    if result.against is not None:
        other = result.against
        print_line(f"{other.model} here: perplexity {other.perplexity:.4f}")
        print_line(
            f"KL per token at least {other.kl_divergence:.5f}, top-1 agreement "
            f"{other.top1_agreement:.2%}"
        )
        print_line(f"(the server lists tokens with {other.listed_probability:.1%} probability)")


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
