"""The typer application: its commands, and errors turned into one sentence and an exit code."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import sys
import time
from types import FrameType
from typing import Annotated

import typer

from roundwise.cli.commands import (
    bench,
    card,
    compare,
    convert,
    demo,
    doctor,
    evaluate,
    generate,
    inspect,
    plan,
    quantize,
    report,
    serve,
    verify,
)
from roundwise.cli.logs import with_log_options
from roundwise.cli.options import SettingsCommand
from roundwise.cli.output import print_note
from roundwise.errors import Interrupted, RoundwiseError, StorageError, UsageError, quoted
from roundwise.settings import Panel
from roundwise.system.console import console
from roundwise.version import __version__

app = typer.Typer(
    name="roundwise",
    help="Quantize large language models to 2-8 bits with GPTQ; measure and load the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(with_log_options(demo.command))
app.command("plan", cls=SettingsCommand)(with_log_options(plan.command, Panel.RUN))
app.command("quantize", cls=SettingsCommand)(with_log_options(quantize.command, Panel.RUN))
app.command("inspect")(with_log_options(inspect.command))
app.command("verify")(with_log_options(verify.command))
app.command("eval")(with_log_options(evaluate.command))
app.command("compare")(with_log_options(compare.command))
app.command("report")(with_log_options(report.command))
app.command("card")(with_log_options(card.command))
app.command("convert")(with_log_options(convert.command))
app.command("generate")(with_log_options(generate.command))
app.command("bench")(with_log_options(bench.command))
app.command("serve")(with_log_options(serve.command))
app.command("doctor")(with_log_options(doctor.command))


def _print_version(is_given: bool) -> None:
    if is_given:
        print(f"roundwise {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Quantize large language models to 2-8 bits with GPTQ; measure and load the result."""


def main() -> None:
    """Runs the command line. Exit code 0: done; 1: failed check or run; 2: bad usage or input."""
    # Without transformers' own progress bars, stderr stays readable in a log.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except RoundwiseError as error:
        sys.exit(_report(error))
    except KeyboardInterrupt:
        console.print("stopped")
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output has exited: write nothing more, not even at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(_report(_file_error(error)))


def _report(error: RoundwiseError) -> int:
    """Prints an error, once for all ranks that have the same, and returns its exit code."""
    rank = _rank()
    if rank and (error.exit_code == 2 or isinstance(error, Interrupted)) and _ended_by_first_rank():
        return error.exit_code  # the same error on every rank: the first has reported it
    if "--json" in sys.argv:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}))
    label = f"rank {rank}: error:" if rank else "error:"
    console.quiet = False  # --quiet is for everything but errors
    print_note(" ".join(str(error).split()), label=label, style="bold red")
    if isinstance(error, Interrupted):
        again = [word for word in sys.argv[1:] if word != "--restart"]
        print_note(shlex.join(["roundwise", *again]), label="resume with:")
    return error.exit_code


def _file_error(error: OSError) -> RoundwiseError:
    """Returns the error about a file or folder that cannot be used: bad input if its name is wrong."""
    bad_names = (
        errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ELOOP,
        errno.EPERM,
    )  # fmt: skip
    kind = UsageError if error.errno in bad_names else StorageError
    return kind(f"{quoted(str(error.filename))} cannot be used: {error.strerror}")


def _rank() -> int:
    """Returns the rank of this process, which torchrun sets; 0 without torchrun."""
    return int(os.environ.get("RANK", "0")) if "WORLD_SIZE" in os.environ else 0


def _ended_by_first_rank() -> bool:
    """Waits until torchrun stops this process, which it does when another rank ends.

    A rank that ended before the first one would have that stopped before it can report the error.

    Returns:
        False if nothing happened for ten seconds: the first rank does not have the error.
    """
    try:
        time.sleep(10)
    except KeyboardInterrupt:  # SIGTERM
        return True
    return False


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    """Signal handler: SIGTERM stops a run like Ctrl-C, and finished blocks are kept."""
    raise KeyboardInterrupt
