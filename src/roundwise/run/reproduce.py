"""A run done again from the manifest of its result, and the bytes of both compared.

Model and text are held against the manifest's hashes before work begins. What cannot be held still,
another processor or another version, is said; whether it mattered, the comparison tells.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from roundwise.config import Mode, QuantizeConfig
from roundwise.errors import CalibrationError, CheckpointError, OutputError
from roundwise.run.api import QuantizeResult, execute
from roundwise.run.environment import describe_difference, platform_info, torch_threads
from roundwise.run.loop import Progress
from roundwise.run.prepare import prepare
from roundwise.system.memory import parse_mode
from roundwise.verify import MANIFEST, read_manifest


@dataclass(frozen=True)
class Reproduction:
    """A run and how its result compares with that of an earlier one."""

    result: QuantizeResult
    files: dict[str, bool]
    """Name of each file of either result -> it has the same bytes in both."""
    platform: str
    """Where the two machines differ, in words; empty: nowhere."""

    @property
    def same(self) -> bool:
        """All files have the same bytes."""
        return all(self.files.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: those of the run, and the comparison."""
        return {
            **self.result.as_dict(), "same": self.same, "files": self.files, "platform": self.platform
        }  # fmt: skip


@dataclass(frozen=True)
class RecordedRun:
    """What a manifest says about how to do it again."""

    config: QuantizeConfig
    model: str
    calibration: str | None
    windows: dict[str, Any]
    """samples, seq_len, batch_size, seed, only."""
    mode: Mode | None
    torch_threads: int
    device: str
    """cpu, or auto."""


def reproduce(
    manifest: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    calibration: str | None = None,
    max_memory: str | int | None = None,
    restart: bool = False,
    strict: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Reproduction:
    """Quantizes as a manifest says, and compares.

    Args:
        manifest: a checkpoint made by roundwise, or its roundwise.json.
        out: folder for the result.
        model, calibration: where they are now, if elsewhere than in the first run.
        max_memory, restart, strict, progress: as for `quantize`.

    Raises:
        CheckpointError: no manifest, a damaged one, or another model than it was made from.
        CalibrationError: another text.
        UsageError, RunError: as for `quantize`.
    """
    file = Path(manifest) / MANIFEST if Path(manifest).is_dir() else Path(manifest)
    record = read_manifest(file)
    if record is None:
        raise CheckpointError(f"there is no {file}: only checkpoints made by roundwise have one")
    if Path(out).resolve() == file.parent.resolve():
        raise OutputError(f"{out} is the checkpoint to compare with: give another folder")
    recipe = read_recipe(file, record)
    with torch_threads(recipe.torch_threads):
        prepared = prepare(
            model or recipe.model, out, recipe.config, calibration or recipe.calibration,
            **recipe.windows, mode=recipe.mode, max_memory=max_memory, device=recipe.device,
        )  # fmt: skip
        made, now = record["run"], prepared.run.fingerprint(None)
        _check_model(prepared.run.streamed.checkpoint.folder, file, made["model"], now["model"])
        _check_text(file, made["calibration"], now["calibration"])
        changed = describe_difference(made, now)
        said = [f"{changed}: the bytes may differ from those of {file}"] if changed else []
        prepared = replace(prepared, not_as_asked=[*prepared.not_as_asked, *said])
        result = execute(prepared, restart=restart, strict=strict, progress=progress)
    written = read_manifest(Path(out))
    assert written is not None
    before, after = record["files"], written["files"]
    return Reproduction(
        result,
        {name: before.get(name) == after.get(name) for name in {**before, **after}},
        describe_difference(record.get("platform"), platform_info()),
    )


def read_recipe(file: Path, record: dict[str, Any]) -> RecordedRun:
    """How the run of a manifest was made.

    Raises:
        CheckpointError: it is damaged, of an older version, or the text was a Python list.
        ConfigError: settings that this version does not have.
    """
    run = record["run"]
    try:
        settings = {**run["config"], "dynamic": dict(run["config"]["dynamic"])}
        texts = run["calibration"]
        windows: dict[str, Any] = {
            "samples": 1, "seq_len": 1, "batch_size": 1, "seed": 0, "only": None
        }  # fmt: skip
        if texts is not None:
            names = {"samples": "wanted", "seq_len": "seq_len", "batch_size": "batch_size"}
            windows = {name: int(texts[key]) for name, key in {**names, "seed": "seed"}.items()}
            windows["only"] = texts.get("only")
        mode = None if run["mode"] == "none" else parse_mode(run["mode"])
        given = record["given"]
        device = "cpu" if run.get("device", "cpu") == "cpu" else "auto"
        count, source, text = int(run["threads"]), str(given["model"]), given["calibration"]
        if not isinstance(run["model"]["files"], dict):
            raise ValueError("files")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} does not say how to do it again ({error}): it is damaged, or of another version"
        ) from None
    if texts is not None and not isinstance(text, str):
        raise CheckpointError(
            f"{file} is of a run that was calibrated with a Python list, which it does not hold: give "
            "the same list to roundwise.quantize"
        )
    return RecordedRun(QuantizeConfig(**settings), source, text, windows, mode, count, device)


def _check_model(folder: Path, file: Path, made: dict[str, Any], now: dict[str, Any]) -> None:
    wrong = [name for name, digest in made["files"].items() if now["files"].get(name) != digest]
    wrong += [name for name in now["files"] if name not in made["files"]]
    wrong += ["config.json"] if made.get("config") != now["config"] else []
    if wrong:
        raise CheckpointError(
            f"{folder} is not the model that {file} was made from: {', '.join(wrong)} differs; give the "
            "folder with that model as MODEL"
        )


def _check_text(file: Path, made: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    if made is None or now is None or made == now:
        return
    before, after = (dict(map(tuple, part.get("texts", []))) for part in (made, now))
    wrong = [name for name, digest in after.items() if before.get(name) != digest]
    if wrong:
        raise CalibrationError(
            f"{', '.join(wrong)} is not the text that {file} was calibrated with; give that one with "
            "--calibration"
        )
    raise CalibrationError(
        f"the calibration tokens are not those of {file}: {describe_difference(made, now, 'calibration')}; is "
        "the tokenizer another one?"
    )
