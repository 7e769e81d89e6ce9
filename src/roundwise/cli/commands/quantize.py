"""`roundwise quantize`, also with --from-manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from roundwise.cli.options import (
    JsonOption,
    Panel,
    SourceArgument,
    option_name,
    settings_as_options,
)
from roundwise.cli.progress import Reporter, print_json, stdout, steps
from roundwise.cli.results import print_result, write_report_after_run
from roundwise.config import CalibrationConfig, QuantizeConfig, RunConfig
from roundwise.errors import ConfigError

#: Parameters that --from-manifest allows; all other settings are in the manifest.
ALLOWED_WITH_MANIFEST = {
    "model", "out", "output", "from_manifest", "calibration", "max_memory", "restart", "strict",
    "as_json",
}  # fmt: skip


@settings_as_options
def command(
    context: typer.Context,
    config: QuantizeConfig,
    windows: CalibrationConfig,
    run: RunConfig,
    model: Annotated[SourceArgument | None, typer.Argument()] = None,
