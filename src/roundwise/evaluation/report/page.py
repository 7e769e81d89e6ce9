"""Facts and charts as one HTML file that asks nobody for anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from roundwise.checkpoint.reader import OWN_FILES
from roundwise.checkpoint.writer import atomic_write
from roundwise.evaluation.report.charts import charts
from roundwise.evaluation.report.facts import Answers, Evaluation, Facts, read_facts
from roundwise.system.memory import format_size

#: The page's name in the folder of its checkpoint.
PAGE = OWN_FILES[2]


def write_report(
    folder: str | os.PathLike[str],
    out: Path | None = None,
    *,
    evaluation: Evaluation | None = None,
    answers: list[Answers] | None = None,
) -> Path:
    """Writes the report of a finished checkpoint; returns where.

    Args:
        folder: of the checkpoint.
        out: file to write; None: `roundwise-report.html` in the folder.
        evaluation, answers: what was measured with it (see `measure`); the page has no such part
            without.

    Raises:
        CheckpointError: it is not one that roundwise finished, or it is damaged.
        StorageError: the page cannot be written.
    """
    page = render(read_facts(Path(folder), evaluation=evaluation, answers=answers))
    path = out or Path(folder) / PAGE
    with atomic_write(path, sync=False) as file:
        file.write(page.encode("utf-8", "replace"))
    return path


def render(facts: Facts) -> str:
    """The page, as text."""
    environment = Environment(
        loader=PackageLoader("roundwise.evaluation.report", ""), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "size": format_size,
        "error": _error,
        "seconds": _seconds,
        "plain": _plain,
    }
    drawn = {name: Markup(svg) for name, svg in charts(facts).items()}  # noqa: S704  # escaped there
    return environment.get_template("page.html").render(
        facts=facts, manifest=facts.manifest, run=facts.manifest.run, charts=drawn
    )  # fmt: skip


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _seconds(value: float) -> str:
    minutes, seconds = divmod(value, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"


def _plain(value: Any) -> str:
    """A setting, as one would write it."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(each)}" for key, each in value.items()) or "none"
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "none"}[value]
    return str(value)
