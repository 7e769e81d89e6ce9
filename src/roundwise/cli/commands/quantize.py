"""`roundwise quantize`, and with --from-manifest a run done again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from roundwise.cli.options import SOURCE, JsonOption, settings_as_options
from roundwise.cli.output import print_json, print_line
from roundwise.cli.recipe import read_recipe, recipe_text
from roundwise.cli.results import print_result, write_run_report
from roundwise.config import CalibrationConfig, QuantizeConfig, RunConfig
from roundwise.errors import ConfigError
from roundwise.settings import Panel

#: Parameters that can be given with --from-manifest; all other settings are in the manifest.
ALLOWED_WITH_MANIFEST = {
    "model", "out", "output", "from_manifest", "calibration", "max_memory", "restart", "strict",
    "as_json",
}  # fmt: skip
#: Options that a recipe file cannot have.
NOT_IN_RECIPES = {
    "recipe_file", "print_config", "from_manifest", "output", "push", "as_json", "help",
}  # fmt: skip


def _use_recipe(context: typer.Context, file: Path | None) -> Path | None:
    """Makes the options of a recipe file the defaults of the command."""
    if file is not None:
        known = {
            parameter.name: bool(parameter.multiple)
            for parameter in context.command.params
            if parameter.name not in NOT_IN_RECIPES and hasattr(parameter, "multiple")
        }
        context.default_map = read_recipe(file, known)
    return file


@settings_as_options
def command(
    *,
    context: typer.Context,
    model: Annotated[str | None, SOURCE] = None,
    out: Annotated[Path | None, typer.Argument(help="Folder for the quantized checkpoint.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: a text or JSONL file, folder, pattern, python-stdlib, wikitext2, "
            "c4, github-code, or NAME:SPLIT:COLUMN; several with weights: "
            "code.txt:0.7,chat.jsonl:0.3; self: text that the model writes.",
            rich_help_panel=Panel.CALIBRATION,
        ),
    ] = None,
    windows: CalibrationConfig,
    config: QuantizeConfig,
    run: RunConfig,
    from_manifest: Annotated[
        Path | None,
        typer.Option(help="Repeat the run of this checkpoint (or roundwise.json) and compare."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Output folder (with --from-manifest).")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            help="Push the result to this repository of the Hugging Face hub, owner/name; a new one is "
            "private."
        ),
    ] = None,
    recipe_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            is_eager=True,
            callback=_use_recipe,
            help="YAML file of options, such as `group-size: 64`; those on the command line come first.",
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option(help="Print all options as a file for --config, and exit.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model into a checkpoint in the standard GPTQ format.

    A run that was stopped resumes when the same command is given again.
    Several processes, on one machine or many, can share a run:
    torchrun --nproc-per-node N -m roundwise quantize …
    """
    if print_config:
        print(recipe_text(calibration, [windows, config, run]), end="")
        return
    folder = _output_folder(out, output)
    if from_manifest is not None:
        _refuse_other_options(context)
        _repeat_run(from_manifest, folder, model, calibration, run, as_json=as_json)
        return
    if model is None:
        raise ConfigError("which model? roundwise quantize MODEL OUT")

    from roundwise.publish.push import check_push
    from roundwise.publish.push import push as push_folder
    from roundwise.run.api import quantize
    from roundwise.system.distributed import join_process_group

    if push is not None:
        check_push(push)
    with join_process_group() as ranks:
        result = quantize(
            model, folder, config, calibration, **windows.model_dump(), **run.model_dump(),
            progress=ranks.is_first,
        )  # fmt: skip
    if not ranks.is_first:
        return
    page = write_run_report(result.output)
    address = None if push is None else push_folder(result.output, push)
    if as_json:
        pushed = {} if address is None else {"pushed_to": address}
        print_json({**result.as_dict(), "report": str(page) if page else None, **pushed})
    else:
        print_result(result, page)
        if address is not None:
            print_line(f"pushed to {address}")


def _output_folder(out: Path | None, output: Path | None) -> Path:
    folders = [path for path in (out, output) if path is not None]
    if len(folders) != 1:
        raise ConfigError("which folder for the result? roundwise quantize MODEL OUT")
    return folders[0]


def _refuse_other_options(context: typer.Context) -> None:
    """Raises ConfigError if settings are given next to --from-manifest."""
    others = sorted(
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in ALLOWED_WITH_MANIFEST and _is_given(context, name)
    )
    if others:
        raise ConfigError(
            f"{', '.join(others)}: the settings are those of the manifest, leave them out"
        )


def _is_given(context: typer.Context, name: str) -> bool:
    """Returns True if the option is on the command line."""
    source = context.get_parameter_source(name)
    # By name: newer versions of typer bring a click of their own.
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _repeat_run(
    manifest: Path,
    out: Path,
    model: str | None,
    calibration: str | None,
    run: RunConfig,
    *,
    as_json: bool,
) -> None:
    """Repeats a run and compares the results; exit code 1 if a file differs.

    Args:
        manifest: checkpoint of the earlier run, or its roundwise.json.
        out: output folder.
        model, calibration: where they are now; None: where they were.
        run: max_memory, restart and strict count.
        as_json: print one JSON object.
    """
    from roundwise.run.reproduce import reproduce

    repeated = reproduce(
        manifest, out, model=model, calibration=calibration, max_memory=run.max_memory,
        restart=run.restart, strict=run.strict, progress=True,
    )  # fmt: skip
    if as_json:
        print_json(repeated.as_dict())
    else:
        print_result(repeated.result)
        for name, same in repeated.files.items():
            print_line(f"{name}: {'equal' if same else 'different'}")
        verdict = "the same bytes" if repeated.same else "not the same bytes"
        differs = f"; the machines differ in {repeated.platform}" if repeated.platform else ""
        print_line(f"{verdict} as {manifest}{differs}")
    if not repeated.same:
        raise typer.Exit(1)
