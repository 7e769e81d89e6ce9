"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: For everything that is not the result.
console = Console(stderr=True)
#: For results meant to be read by people.
stdout = Console()

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def print_json(value: dict[str, Any]) -> None:
    """The one JSON object of a command."""
    print(json.dumps(value))


class Steps:
    """Progress through a known number of steps: a bar with ETA on a terminal, plain lines elsewhere."""

    def __init__(self, bar: Progress | None, title: str) -> None:
        self._bar, self._title, self._begun = bar, title, time.monotonic()
        self._task = bar.add_task(title, total=1.0) if bar else None

    def update(self, done: float, note: str = "") -> None:
        """`done` is the finished part, 0 … 1; `note` is a short text about the last step."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, description=f"{self._title} {note}")

    def line(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        (self._bar.console if self._bar else console).print(text, highlight=False, soft_wrap=True)

    def eta(self, done: float) -> str:
        """Time left, for plain lines."""
        spent = time.monotonic() - self._begun
        return f"{spent * (1 - done) / done:.0f} s left" if done > 0 else ""


@contextmanager
def steps(title: str, *, shown: bool = True) -> Iterator[Steps]:
    """Shows progress on stderr while the block runs; without a bar if it is not to be `shown`."""
    if not shown or not console.is_terminal or os.environ.get("TERM") == "dumb":
        yield Steps(None, title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield Steps(bar, title)
