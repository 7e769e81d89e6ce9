"""The command reference as markdown, from the same declarations as --help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

import click
import typer

from roundwise.cli.app import app


def reference() -> str:
    """Returns a page with every command, its arguments, options and defaults."""
    group = typer.main.get_command(app)
    context = click.Context(group, info_name="roundwise")
    lines = ["# Command reference", "", "What `--help` says, on one page.", ""]
    lines += ["`--json` on each command prints one JSON object on stdout; everything else goes to"]
    lines += ["stderr. Exit code 0: done; 1: a check or run failed; 2: bad usage or input.", ""]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        lines += _command(command, click.Context(command, info_name=name, parent=context))
    return "\n".join(lines) + "\n"


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    """Yields the section of one command: a table of its options, or one for each panel."""
    usage = " ".join(command.collect_usage_pieces(context))
    yield from (
        f"## roundwise {context.info_name}",
        "",
        f"    roundwise {context.info_name} {usage}",
        "",
    )
    yield from ((command.help or "").replace("\b", "").strip(), "")
    shown = [p for p in command.params if not getattr(p, "hidden", False)]
    for panel, parameters in groupby(shown, key=lambda p: getattr(p, "rich_help_panel", None)):
        if panel:
            yield from (f"**{panel}**", "")
        yield from ("| | | default |", "|---|---|---|")
        yield from (_row(parameter) for parameter in parameters)
        yield ""


def _row(parameter: click.Parameter) -> str:
    """Returns the line of an argument or option."""
    names = " / ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument":
        names = f"`{str(parameter.name).upper()}`"
    help_text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
    # As code: "--" in a text would be printed as a dash.
    help_text = re.sub(r"(?<![\w`'-])--[a-z][\w-]*", lambda match: f"`{match[0]}`", help_text)
    return f"| {names} | {help_text} | {_default(parameter)} |"


def _default(parameter: click.Parameter) -> str:
    """Returns the value that holds when the option is not given."""
    if parameter.required:
        return "required"
    if isinstance(in_words := getattr(parameter, "show_default", None), str):
        return in_words
    if parameter.default is None or callable(parameter.default):
        return ""
    if parameter.secondary_opts:
        return f"`{(parameter.opts if parameter.default else parameter.secondary_opts)[0]}`"
    if isinstance(parameter.default, bool):
        return ""
    return f"`{parameter.default}`"
