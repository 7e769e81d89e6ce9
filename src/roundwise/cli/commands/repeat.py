"""`roundwise quantize --from-manifest`."""

from __future__ import annotations

from pathlib import Path

import typer

from roundwise.cli.output import print_json, stdout, steps
from roundwise.errors import ConfigError

#: What may be given beside --from-manifest; all else is in the manifest.
ALLOWED = {
    "model", "out", "output", "from_manifest", "calibration", "max_memory", "restart", "strict",
    "as_json",
}  # fmt: skip


def command(
    context: typer.Context,
    manifest: Path,
    out: Path,
    *,
    model: str | None,
    calibration: str | None,
    max_memory: str | None,
    restart: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Does a run again and compares; exit code 1 if a file differs."""
    from roundwise.cli.commands.quantize import Reporter, print_result
    from roundwise.pipeline.repeat import repeat

    others = sorted(
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in ALLOWED and _given(context, name)
    )
    if others:
        raise ConfigError(
            f"{', '.join(others)}: the settings are those of the manifest, leave them out"
        )
    with steps("quantizing") as shown:
        found = repeat(
            manifest, out, model=model, calibration=calibration, max_memory=max_memory,
            restart=restart, strict=strict, progress=Reporter(shown),
        )  # fmt: skip
    if as_json:
        print_json(found.as_dict())
    else:
        print_result(found.result)
        for name, same in found.files.items():
            stdout.print(
                f"{name}: {'equal' if same else 'different'}", highlight=False, soft_wrap=True
            )
        verdict = "the same bytes" if found.same else "not the same bytes"
        differs = f"; the machines differ in {found.platform}" if found.platform else ""
        stdout.print(f"{verdict} as {manifest}{differs}", highlight=False, soft_wrap=True)
    if not found.same:
        raise typer.Exit(1)


def _given(context: typer.Context, name: str) -> bool:
    """The option stands on the command line."""
    source = context.get_parameter_source(name)
    # By name: newer versions of typer bring a click of their own.
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")
