"""`roundwise compare`."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roundwise.cli.comparison import print_agreement, print_comparisons
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
    ShotsOption,
    SpecialTokensOption,
    StrideOption,
    TasksOption,
    TextOption,
    WindowOption,
    split_names,
)
from roundwise.cli.output import print_json, print_note
from roundwise.system.console import steps

if TYPE_CHECKING:
    import torch

    from roundwise.evaluation.compare import Comparison, Protocol
    from roundwise.evaluation.reference_prompts import PromptAgreement


def command(
    model: Annotated[str, typer.Argument(help="Original model: folder or Hugging Face hub id.")],
    quantized: Annotated[
        list[str] | None,
        typer.Argument(help="Checkpoints made from it; several can be compared at once."),
    ] = None,
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
    prompts: Annotated[
        str | None,
        typer.Option(help="Compare greedy answers to these prompts: lines of a text, or JSONL."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum tokens of an answer to a prompt.", min=1)
    ] = 64,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            help="Exit code 1 if answers to prompts agree for less than this share of their tokens.",
            min=0,
            max=1,
        ),
    ] = None,
    endpoint: EndpointOption = None,
    api_key: ApiKeyOption = None,
    batch_size: BatchSizeOption = 4,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compare quantized models with their original: accuracy, size, speed, and a verdict.

    Measures perplexity in sliding windows, KL divergence and top-1 agreement per token,
    tasks through lm-eval, greedy answers to prompts, size, speed and memory.
    With --max-perplexity-increase, --max-kl or --min-agreement the exit code says pass or fail.
    With --endpoint, the server of the quantized model answers the prompts.
    """
    from roundwise.errors import ConfigError
    from roundwise.evaluation.compare import Protocol
    from roundwise.inference.load import parse_dtype
    from roundwise.system.device import parse_device

    folders = quantized or []
    limits = _Limits(max_perplexity_increase, max_kl, min_agreement)
    on_text = text is not None or tasks is not None
    _check_usage(folders, limits, text, tasks, prompts, endpoint, baseline)
    if not on_text and prompts is None:
        raise ConfigError("nothing to compare on: give --text, --tasks, --prompts, or several")
    comparisons: list[Comparison] = []
    agreements: list[PromptAgreement] = []
    torch_dtype, torch_device = parse_dtype(dtype), str(parse_device(device))
    if on_text:
        ids, special = evaluation_tokens(model, text, max_tokens, special=special_tokens)
        protocol = Protocol(
            ids=ids, special=special, window=fitting_window(model, window), stride=stride,
            batch_size=batch_size, tasks=split_names(tasks), include_path=include_path, shots=shots,
            limit=limit, speed=speed, dtype=torch_dtype, device=torch_device,
        )  # fmt: skip
        comparisons = _compare(model, folders, protocol, baseline)
    if prompts is not None:
        agreements = _compare_answers(
            model, folders, prompts, max_new_tokens, endpoint, api_key, torch_dtype, torch_device
        )
    failed = [
        *(reason for each in comparisons[: len(folders)] for reason in limits.broken(each)),
        *(reason for each in agreements for reason in limits.broken_by_answers(each)),
    ]
    if as_json:
        print_json(_as_json(text, comparisons, agreements, failed, alone=len(folders) == 1))
    else:
        if comparisons:
            print_comparisons(comparisons)
        for agreement in agreements:
            print_agreement(agreement)
        for reason in failed:
            print_note(reason, label="failed:", style="bold red")
    if failed:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Limits:
    """Limits whose breach makes the command fail; None: no limit."""

    perplexity_increase: float | None
    kl: float | None
    agreement: float | None

    def broken(self, comparison: Comparison) -> list[str]:
        """Returns one sentence per limit that a model exceeds on the text."""
        reasons = []
        if comparison.perplexity is not None and self.perplexity_increase is not None:
            rise = comparison.perplexity[1] - comparison.perplexity[0]
            if rise > self.perplexity_increase:
                reasons.append(
                    f"{comparison.name}: perplexity rises by {rise:.4g}, more than "
                    f"{self.perplexity_increase:g}"
                )
        kl = comparison.kl_divergence
        if kl is not None and self.kl is not None and kl > self.kl:
            reasons.append(f"{comparison.name}: KL is {kl:.4g}, more than {self.kl:g}")
        return reasons

    def broken_by_answers(self, agreement: PromptAgreement) -> list[str]:
        """Returns a sentence if the answers to prompts agree too little."""
        if self.agreement is None or agreement.agreement >= self.agreement:
            return []
        return [
            f"{agreement.name}: {agreement.agreement:.1%} of the answers agree, less than "
            f"{self.agreement:.1%}"
        ]


def _check_usage(
    quantized: list[str],
    limits: _Limits,
    text: str | None,
    tasks: str | None,
    prompts: str | None,
    endpoint: str | None,
    baseline: str | None,
) -> None:
    """Fails if options do not go together.

    Raises:
        ConfigError: says which.
    """
    from roundwise.errors import ConfigError

    if baseline not in (None, "rtn"):
        raise ConfigError(f"--baseline {baseline!r} is not supported: use rtn")
    if text is None and (limits.kl is not None or limits.perplexity_increase is not None):
        raise ConfigError("--max-kl and --max-perplexity-increase need a text: --text FILE")
    if prompts is None and (limits.agreement is not None or endpoint is not None):
        raise ConfigError("--min-agreement and --endpoint need prompts: --prompts FILE")
    if endpoint is None and not quantized:
        raise ConfigError("name a quantized model behind the original, or --endpoint URL")
    if endpoint is not None and (quantized or text is not None or tasks is not None):
        raise ConfigError(
            "with --endpoint give only the original and --prompts: the server has the quantized model; "
            "its perplexity is measured by `roundwise eval --endpoint`"
        )


def _compare(
    model: str, quantized: list[str], protocol: Protocol, baseline: str | None
) -> list[Comparison]:
    """Compares models on a text and tasks; the baseline, if there is one, comes last."""
    from roundwise.evaluation.compare import compare, round_to_nearest_like

    with tempfile.TemporaryDirectory() as scratch, steps("comparing") as shown:
        folders: list[str | os.PathLike[str]] = list(quantized)
        if baseline is not None:
            rounded = Path(scratch) / "rtn"
            round_to_nearest_like(model, quantized[0], rounded)
            folders.append(rounded)
        return compare(model, folders, protocol, progress=shown.stage)


def _compare_answers(
    model: str,
    quantized: list[str],
    prompts: str,
    tokens: int,
    endpoint: str | None,
    api_key: str | None,
    dtype: torch.dtype | str,
    device: str,
) -> list[PromptAgreement]:
    """Compares greedy answers to prompts."""
    from roundwise.evaluation.endpoint.client import Endpoint
    from roundwise.evaluation.reference_prompts import compare_answers, read_prompts

    read = read_prompts(prompts)
    server = Endpoint(endpoint, api_key=api_key) if endpoint is not None else None
    with steps("comparing answers") as shown:
        return compare_answers(
            model, quantized, read, tokens=tokens, endpoint=server, dtype=dtype, device=device,
            progress=shown.stage,
        )  # fmt: skip


def _as_json(
    text: str | None,
    comparisons: list[Comparison],
    agreements: list[PromptAgreement],
    failed: list[str],
    *,
    alone: bool,
) -> dict[str, Any]:
    """Returns the JSON of the command.

    Args:
        text: the text that was given.
        comparisons, agreements: the results.
        failed: a sentence for each broken limit.
        alone: only one model is compared: its values are at the top, too.
    """
    models = [comparison.as_dict() for comparison in comparisons]
    answers = [agreement.as_dict() for agreement in agreements]
    return {
        **(models[0] if models and alone else {}),
        "text": None if text is None else Path(text).name,
        "models": models,
        "prompts": answers,
        "failed": failed,
    }
