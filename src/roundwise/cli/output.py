"""Output of the commands: results on stdout, everything else (progress, notes, errors) on stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from roundwise.system.console import console, stdout, visible


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
    """Prints a result as lines of a label, padded to `width`, and a text.

    On a terminal, a text that is too long goes on below itself; elsewhere each is one line.
    """
    if not stdout.is_terminal:
        for label, text in lines.items():
            print_line(f"{label:{width}} {text}")
        return
    grid = Table.grid(padding=(0, 1))
    grid.add_column(min_width=width, no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in lines.items():
        grid.add_row(Text(visible(label)), Text(visible(text)))
    stdout.print(grid)
