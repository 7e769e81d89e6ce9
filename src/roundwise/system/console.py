"""The terminal: what is printed there is free of control characters, and progress has a bar.

A bar is shown on terminals and in notebooks; elsewhere each part of the work is a line.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.errors import MarkupError
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from roundwise.system.activity import listening, logger

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


def count_of(number: int | None, noun: str) -> str:
    """Returns "1 thread" or "2 threads"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def in_words(value: Any) -> str:
    """Returns a value of JSON for readers: "yes" instead of True, lists and objects without brackets."""
    if isinstance(value, list):
        return ", ".join(map(in_words, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {in_words(each)}" for key, each in value.items()) or "none"
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "none"}[value]
    return str(value)


def is_verbose() -> bool:
    """True if announcements reach the terminal as log lines, so that they need no lines of their own."""
    return any(isinstance(handler, ConsoleHandler) for handler in logger.handlers)


class ConsoleHandler(logging.Handler):
    """Logging handler that prints on stderr, above the bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the message of a record."""
        console.print(Text(visible(self.format(record))), highlight=False, soft_wrap=True)


class _Clock(ProgressColumn):
    """Column of the time since the command began and the time left: one clock for all its work."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """Returns the cell's text."""
        spent = format_seconds(time.monotonic() - task.fields["begun"])
        left = task.fields["left"]
        return Text(spent if left is None else f"{spent}, about {format_seconds(left())} left")


def format_seconds(seconds: float) -> str:
    """Returns a duration as minutes and seconds, such as 0:07 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Steps:
    """Shows what a command is doing: a bar with a clock on a terminal, plain lines elsewhere."""

    def __init__(self, bar: Progress | None, title: str, *, speaks: bool = True) -> None:
        self._bar, self._title, self._work, self._speaks = bar, title, "", speaks
        self._task = (
            bar.add_task(title, total=None, begun=time.monotonic(), left=None) if bar else None
        )

    def listen(self, work: str, done: int = 0, total: int = 0) -> None:
        """Shows announced work (`system.activity`): in the bar, or on a line of its own."""
        self.stage(work, done / total if total else None, f" {done}/{total}" if total else "")

    def stage(self, work: str, part: float | None = None, suffix: str = "") -> None:
        """Shows a part of the command's work.

        Args:
            work: its name; a new one gets a line where there is no bar.
            part: finished part of it, 0 to 1; None: not known.
            suffix: text behind the name in the bar.
        """
        self._show(work, part, suffix)
        if self._bar is None and work != self._work and self._speaks:
            self.line(work)
        self._work = work

    def update(self, done: float, note: str = "") -> None:
        """Moves the bar.

        Args:
            done: finished part of this work, 0 to 1.
            note: short text about the last step.
        """
        self._show(note or self._work or self._title, done, "")

    def time_left(self, seconds: float | None) -> None:
        """Sets the estimate that the clock counts down from."""
        if self._bar is not None and self._task is not None and seconds is not None:
            end = time.monotonic() + seconds
            self._bar.update(self._task, left=lambda: max(0.0, end - time.monotonic()))

    def line(self, text: str) -> None:
        """Prints a line on stderr, above the bar if there is one."""
        (self._bar.console if self._bar else console).print(text, highlight=False, soft_wrap=True)

    def _show(self, what: str, part: float | None, suffix: str) -> None:
        if self._bar is None or self._task is None:
            return
        total = None if part is None else 1.0
        self._bar.update(self._task, description=what + suffix, total=total, completed=part or 0.0)


@contextmanager
def steps(title: str, *, shown: bool = True, lines: bool = True) -> Iterator[Steps]:
    """Context manager: shows progress on stderr, as a bar on a terminal or in a notebook.

    Args:
        title: name of the work.
        shown: False: shows nothing.
        lines: elsewhere, each part of the work is a line; False: nothing is shown there.
    """
    if not (shown and (lines or console.is_terminal or console.is_jupyter)):
        yield Steps(None, title, speaks=False)
        return
    if not (console.is_terminal or console.is_jupyter) or os.environ.get("TERM") == "dumb":
        plain = Steps(None, title, speaks=not is_verbose())
        with listening(plain.listen):
            yield plain
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), _Clock())
    with Progress(*columns, console=console, transient=True) as bar:
        display = Steps(bar, title)
        with listening(display.listen):
            yield display
