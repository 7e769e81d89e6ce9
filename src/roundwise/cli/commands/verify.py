"""`roundwise verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from roundwise.cli.progress import JsonOption, console, print_json, stdout


def command(
    checkpoint: Annotated[str, typer.Argument(help="Quantized checkpoint.")],
    against: Annotated[str | None, typer.Option(help="The model that it was made from.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Read a finished checkpoint back and check all that can be checked. Exit code 1 if it fails."""
    from roundwise.checkpoint.hub import local_folder
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.verify import audit

    source = Checkpoint(local_folder(against)) if against else None
    folder = local_folder(checkpoint)
    Checkpoint(folder)  # no checkpoint at all is bad input, not a failed check
    report = audit(folder, against=source)
    if as_json:
        print_json(
            {"checkpoint": checkpoint, "ok": not report.failures,
             "checked": report.checked, "failures": report.failures}
        )  # fmt: skip
    else:
        for kind, count in report.checked.items():
            stdout.print(f"{kind}: {count} checked", highlight=False)
        for failure in report.failures:
            console.print(f"[red]failed:[/] {failure}", highlight=False, soft_wrap=True)
        stdout.print("verified" if not report.failures else f"{len(report.failures)} checks failed")
    if report.failures:
        raise typer.Exit(1)
