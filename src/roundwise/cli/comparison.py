"""Prints comparisons of quantized models with their original."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from roundwise.cli.output import print_line, print_note
from roundwise.system.console import count_of, stdout
from roundwise.system.memory import format_size

if TYPE_CHECKING:
    from roundwise.evaluation.compare import Comparison
    from roundwise.evaluation.reference_prompts import PromptAgreement


def print_agreement(agreement: PromptAgreement) -> None:
    """Prints how many answers are the same, and where the others part."""
    print_line(
        f"{agreement.name}: {agreement.same} of {count_of(len(agreement.results), 'answer')} the "
        f"same, {agreement.agreement:.1%} of the tokens before they part"
    )
    for result in agreement.results:
        if result.parting is None:
            continue
        parting = result.parting
        print_line(f"{_quote(result.prompt[:50])}")
        print_line(
            f"  parts at token {result.agreeing + 1} of {result.tokens}, which the original gave "
            f"{parting.probability:.0%}"
        )
        print_line(f"  original   {_quote(parting.original)}")
        print_line(f"  quantized  {_quote(parting.quantized)}")


def _quote(text: str) -> str:
    """Returns a text on one line, in quotes."""
    return json.dumps(text, ensure_ascii=False)


def print_comparisons(comparisons: list[Comparison]) -> None:
    """Prints a table of the original and all models compared with it, and their verdicts."""
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
