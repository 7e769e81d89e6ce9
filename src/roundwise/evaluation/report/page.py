"""Renders the report: one HTML file with facts and charts that loads nothing from elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from roundwise.checkpoint.side_files import OWN_FILES
from roundwise.checkpoint.writer import atomic_write
from roundwise.evaluation.report.advice import MORE_BITS
from roundwise.evaluation.report.charts import charts
from roundwise.evaluation.report.facts import Answers, Evaluation, Facts, read_facts
from roundwise.system.console import count_of, in_words
from roundwise.system.memory import format_size

#: File name of the page in the folder of its checkpoint.
PAGE = OWN_FILES[2]


def write_report(
    folder: str | os.PathLike[str],
    out: Path | None = None,
    *,
    evaluation: Evaluation | None = None,
    answers: list[Answers] | None = None,
) -> Path:
    """Writes the report of a finished checkpoint.

    Args:
        folder: folder of the checkpoint.
        out: file to write; None: `roundwise-report.html` in the folder.
        evaluation, answers: measurements to add (see `roundwise.evaluation.report.measure`).

    Returns:
        Path of the page.

    Raises:
        CheckpointError: roundwise did not make this checkpoint or has not finished it, or it is damaged.
        StorageError: the page cannot be written.
    """
    page = render(read_facts(Path(folder), evaluation=evaluation, answers=answers))
    path = out or Path(folder) / PAGE
    with atomic_write(path, sync=False) as file:
        file.write(page.encode("utf-8", "replace"))
    return path


def render(facts: Facts) -> str:
    """Returns the page as HTML text."""
    environment = Environment(
        loader=PackageLoader("roundwise.evaluation.report", ""), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "size": format_size,
        "error": _format_error,
        "seconds": _format_seconds,
        "plain": in_words,
        "count_of": count_of,
        "breakable": _breakable,
    }
    svgs = {name: Markup(svg) for name, svg in charts(facts).items()}  # noqa: S704  # already escaped
    return environment.get_template("page.html").render(
        facts=facts, manifest=facts.manifest, run=facts.manifest.run, charts=svgs, more_bits=MORE_BITS
    )  # fmt: skip


def _breakable(name: str) -> Markup:
    """Returns the name of a layer that is broken behind its dots only, if it must be."""
    return escape(name).replace(".", Markup(".<wbr>"))


def _format_error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _format_seconds(value: float) -> str:
    minutes, seconds = divmod(value, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"
