"""`roundwise verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from roundwise.cli.options import JsonOption
from roundwise.cli.output import print_json, print_line, print_note
from roundwise.system.console import count_of, steps


def command(
    checkpoint: Annotated[
        str, typer.Argument(help="Quantized checkpoint: folder or Hugging Face hub id.")
    ],
    against: Annotated[str | None, typer.Option(help="Original model to compare it with.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Read a finished checkpoint back and check everything that can be checked.

    Exit code 1: a check failed.
    """
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.model.gguf_source import open_source
    from roundwise.system.hub import local_folder
    from roundwise.verify import audit

    source = open_source(local_folder(against)) if against else None
    folder = local_folder(checkpoint)
    Checkpoint(folder)  # a folder without a checkpoint is bad input, not a failed check
    with steps("verifying", lines=False):
        report = audit(folder, against=source)
    if as_json:
        print_json(
            {"checkpoint": checkpoint, "ok": not report.failures,
             "checked": report.checked, "failures": report.failures, "notes": report.notes}
        )  # fmt: skip
    else:
        for kind, count in report.checked.items():
            print_line(f"{kind}: {count} checked")
        for note in report.notes:
            print_note(note, label="note:", style="yellow")
        for failure in report.failures:
            print_note(failure, label="failed:", style="red")
        failed = f"{count_of(len(report.failures), 'check')} failed"
        print_line(failed if report.failures else "verified")
    if report.failures:
        raise typer.Exit(1)
