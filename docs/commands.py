"""The command reference as markdown, from the same declarations as --help."""

from __future__ import annotations

from collections.abc import Iterator

import click
import typer

from roundwise.cli.app import app


def reference() -> str:
    """Every command with its arguments, options and defaults."""
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
    usage = " ".join(command.collect_usage_pieces(context))
    yield from (
        f"## roundwise {context.info_name}",
        "",
        f"    roundwise {context.info_name} {usage}",
        "",
    )
    yield from ((command.help or "").replace("\b", "").strip(), "")
    yield from ("| | | default |", "|---|---|---|")
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        words = " / ".join(f"`{word}`" for word in [*parameter.opts, *parameter.secondary_opts])
        if isinstance(parameter, click.Argument):
            words = (
                f"`{(parameter.metavar or parameter.human_readable_name).upper().strip('{}[]')}`"
            )
        help_text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
        yield f"| {words} | {help_text} | {_default(parameter)} |"
    yield ""


def _default(parameter: click.Parameter) -> str:
    """What holds when the option is not given."""
    if parameter.required:
        return "required"
    if parameter.default is None or callable(parameter.default):
        return ""
    if parameter.secondary_opts:
        return f"`{(parameter.opts if parameter.default else parameter.secondary_opts)[0]}`"
    if isinstance(parameter.default, bool):
        return ""
    return f"`{parameter.default}`"
