"""Result of a run in words, and its report page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from roundwise.cli.output import print_labelled, print_line, print_note
from roundwise.system.console import count_of
from roundwise.system.memory import format_size

if TYPE_CHECKING:
    from roundwise.checkpoint.manifest import ExpertCoverage
    from roundwise.run.api import QuantizeResult


def print_result(result: QuantizeResult, page: Path | None = None) -> None:
    """Prints what a run did; the last lines are what could not be done as asked.

    Args:
        result: of the run.
        page: its report, if one was written.
    """
    from roundwise.checkpoint.manifest import widths

    lines = {
        "layers": f"{len(result.layers)}, {result.bits_per_weight:.2f} bits per weight",
        "size": f"{format_size(result.bytes_before)} -> {format_size(result.bytes_after)}",
        "time": f"{result.seconds:.1f} s, mode {result.mode}",
        "peak memory": _peak_memory(result),
    }
    errors = {
        layer.name: layer.relative_error
        for layer in result.layers
        if layer.fallback is None and layer.relative_error is not None
    }
    if errors:
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        lines["output error"] = f"mean {mean:.2e}, largest {errors[worst]:.2e} ({worst})"
    print_labelled(lines, width=12)
    for kind, text in widths(result.layers).items():
        print_line(f"{kind}: {text}")
    if result.experts:
        print_line(expert_coverage(result.experts))
    for warning in result.warnings:
        print_line(warning, label="note:", style="yellow")
    if page is not None:
        print_line(f"report: {page}")
    print_line(f"verified, saved in {result.output}")
    for issue in result.not_as_asked:
        print_line(issue, label="not as asked:", style="red")


def _peak_memory(result: QuantizeResult) -> str:
    host = format_size(result.peak_rss_bytes)
    if result.peak_device_bytes is None:
        return host
    return f"{format_size(result.peak_device_bytes)} on {result.device} and {host}"


def expert_coverage(experts: Sequence[ExpertCoverage]) -> str:
    """Returns one line on how many calibration tokens reached the experts."""
    counts = sorted(tokens for module in experts for tokens in module.tokens)
    return (
        f"{count_of(len(counts), 'expert')} in {count_of(len(experts), 'layer')}: {counts[0]} to "
        f"{counts[-1]} calibration tokens each, median {counts[len(counts) // 2]}"
    )


def write_run_report(out: Path) -> Path | None:
    """Writes the report of a run that has just finished; None, and a note, if that fails."""
    from roundwise.evaluation.report.page import write_report

    try:
        return write_report(out)
    except Exception as error:  # the checkpoint is finished: a failed report must not fail the run
        print_note(
            f"the report could not be written ({type(error).__name__}: {error}); "
            f"`roundwise report {out}` tries again",
            label="note:",
            style="yellow",
        )
        return None
