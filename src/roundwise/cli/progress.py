"""Output of the commands: results on stdout, everything else (progress, notes, errors) on stderr."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.errors import MarkupError
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from roundwise.run.api import Progress as RunProgress

#: Characters that a terminal may obey: control characters, and those that turn the direction of text.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Returns a text with every control character but tab and newline as an escape sequence.

    Names, errors and texts of a checkpoint are printed, and must not move the cursor, change the title
    or hide what follows.
    """
    return CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


class SafeConsole(Console):
    """A console that never passes control characters of a text on to the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Returns a text with its markup, or as it is if the markup is damaged."""
        try:
            return super().render_str(visible(text), **options)
        except MarkupError:
            return super().render_str(visible(text), **{**options, "markup": False})


#: Standard error: everything that is not the result.
console: Console = SafeConsole(stderr=True)
#: Standard output: results for people to read.
stdout: Console = SafeConsole()


def print_json(value: dict[str, Any]) -> None:
    """Prints the one JSON object of a command."""
    print(json.dumps(value))


def print_line(text: str, *, label: str = "", style: str = "") -> None:
    """Prints one line of a result on stdout.

    Args:
        text: the line; it has no markup.
        label: word in front of it.
        style: style of the label, such as "bold red".
    """
    stdout.print(_labelled(text, label, style), highlight=False, soft_wrap=True)


def print_note(text: str, *, label: str = "", style: str = "") -> None:
    """Prints one line on stderr; Args as for `print_line`."""
    console.print(_labelled(text, label, style), highlight=False, soft_wrap=True)


def _labelled(text: str, label: str, style: str) -> Text:
    return Text.assemble((label, style), " " if label else "", visible(text))


def print_labelled(lines: Mapping[str, str], width: int) -> None:
    """Prints a result as lines of a label, padded to `width`, and a text."""
    for label, text in lines.items():
        print_line(f"{label:{width}} {text}")


def count_of(number: int | None, noun: str) -> str:
    """Returns "1 thread" or "2 threads"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Steps:
    """Progress from 0 to 1: a bar with the time left on a terminal, plain lines elsewhere."""

    def __init__(self, bar: Progress | None, title: str) -> None:
        self._bar, self._title, self._begun = bar, title, time.monotonic()
        self._task = bar.add_task(title, total=1.0) if bar else None

    def update(self, done: float, note: str = "") -> None:
        """Moves the bar.

        Args:
            done: finished part, 0 to 1.
            note: short text about the last step.
        """
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, description=f"{self._title} {note}")

    def line(self, text: str) -> None:
        """Prints a line on stderr, above the bar if there is one."""
        (self._bar.console if self._bar else console).print(text, highlight=False, soft_wrap=True)

    def eta(self, done: float) -> str:
        """Returns the time left, for plain lines."""
        spent = time.monotonic() - self._begun
        return f"{spent * (1 - done) / done:.0f} s left" if done > 0 else ""


@contextmanager
def steps(title: str, *, shown: bool = True) -> Iterator[Steps]:
    """Context manager: shows progress on stderr; without a bar if not `shown`, or not on a terminal."""
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


class Reporter:
    """Progress callback of a run: moves the bar with each layer and prints a line for each block."""

    def __init__(self, shown: Steps) -> None:
        self._shown, self._layers = shown, list[str]()

    def __call__(self, step: RunProgress) -> None:
        """Shows one step of the run: a layer, or a finished block."""
        layer = step.layer
        if layer is not None:
            short_name = layer.name.rpartition(".")[2]
            error = layer.relative_error
            self._layers.append(f"{short_name} {error:.2e}" if error is not None else short_name)
            self._shown.update(self._finished_part(step, step.block), layer.name)
            return
        part = self._finished_part(step, step.block + 1)
        self._shown.update(part)
        self._shown.line(
            f"block {step.block + 1}/{step.blocks}  {'  '.join(self._layers)}  {self._shown.eta(part)}"
        )
        self._layers = []

    @staticmethod
    def _finished_part(step: RunProgress, finished: int) -> float:
        """Returns the finished part of this run's work; blocks of earlier runs do not count."""
        return (finished - step.resumed) / (step.blocks - step.resumed)
