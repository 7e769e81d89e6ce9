"""Options that every command has: how much is printed, and a file that logs everything."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from roundwise.settings import Panel
from roundwise.system.activity import logger
from roundwise.system.console import ConsoleHandler, console

#: Lines of a log file.
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def with_log_options(
    function: Callable[..., None], panel: Panel | None = None
) -> Callable[..., None]:
    """Returns a command's function with --quiet, --verbose and --log-file, which it does not see.

    Args:
        function: the function; typer reads the signature of the new one.
        panel: panel of the options in --help; None: the one that all options are in.
    """

    @functools.wraps(function)
    def command(*, quiet: bool, verbose: bool, log_file: Path | None, **values: Any) -> None:
        console.quiet = quiet
        if verbose:
            logger.addHandler(ConsoleHandler())
            logger.setLevel(logging.INFO)
        if log_file is not None:
            _log_to(log_file)
        function(**values)

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
    ]
    parameters += [
        _parameter("quiet", bool, False, panel, "--quiet", "-q", "Print results and errors only."),
        _parameter("verbose", bool, False, panel, "--verbose", "-v", "Print each layer."),
        _parameter(
            "log_file", Path | None, None, panel, "--log-file",
            "Append each step, each layer and all warnings to this file.",
        ),
    ]  # fmt: skip
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(
    name: str, kind: Any, default: Any, panel: Panel | None, *texts: str
) -> inspect.Parameter:
    """Returns the parameter of an option.

    Args:
        name: name of the parameter.
        kind: type of its value.
        default: its default.
        panel: panel of the option in --help.
        texts: names of the option, then its help text.
    """
    option = typer.Option(*texts[:-1], help=texts[-1], rich_help_panel=panel)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _log_to(path: Path) -> None:
    """Appends what is logged to a file, the warnings of other libraries too."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    logger.setLevel(logging.INFO)
