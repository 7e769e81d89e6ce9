"""reproduce: carries out the run of a manifest again, and compares the bytes of both results.

Model and text are held against the manifest's hashes before work begins. Another processor or another
version is reported; whether it mattered, the comparison tells.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from roundwise.checkpoint.manifest import (
    MANIFEST,
    CalibrationRecord,
    Manifest,
    ModelIdentity,
    read_manifest,
)
from roundwise.config import CalibrationConfig, QuantizeConfig, RunConfig
from roundwise.errors import CalibrationError, CheckpointError, OutputError
from roundwise.run.api import QuantizeResult, execute
from roundwise.run.environment import describe_difference, platform_info, torch_threads
from roundwise.run.loop import Progress
from roundwise.run.prepare import prepare
from roundwise.run.reporter import reporting


@dataclass(frozen=True)
class Reproduction:
    """A run, and how its result compares with that of an earlier one."""

    result: QuantizeResult
    files: dict[str, bool]
    """File of either result -> it has the same bytes in both."""
    platform: str
    """Differences between the two machines, in words; empty: none."""

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
    """Model, text and settings of the run that made a manifest."""

    config: QuantizeConfig
    model: str
    calibration: str | None
    windows: CalibrationConfig
    options: RunConfig
    threads: int


def reproduce(
    manifest: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    calibration: str | None = None,
    max_memory: str | int | None = None,
    restart: bool = False,
    strict: bool = False,
    progress: Callable[[Progress], None] | bool | None = None,
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
    recorded = read_recorded_run(file, record)
    options = recorded.options.model_copy(
        update={"max_memory": max_memory, "restart": restart, "strict": strict}
    )
    with torch_threads(recorded.threads), reporting(progress) as report:
        plan = prepare(
            model or recorded.model, out, recorded.config, calibration or recorded.calibration,
            recorded.windows, options,
        )  # fmt: skip
        _check_model(
            plan.streamed.checkpoint.folder, file, record.run.model, plan.fingerprint.model
        )
        _check_text(file, record.run.calibration, plan.fingerprint.calibration)
        changed = describe_difference(record.run.as_json(), plan.fingerprint.as_json())
        if changed:
            issue = f"{changed}: the bytes may differ from those of {file}"
            plan = replace(plan, issues=(*plan.issues, issue))
        result = execute(plan, Path(out), options, report)
    written = read_manifest(Path(out))
    assert written is not None
    before, after = record.files, written.files
    earlier, now = ([n for n in each if n.endswith(".safetensors")] for each in (before, after))
    if earlier != now:
        issue = (
            f"{file} is of a checkpoint of {len(earlier)} weight files, and {out} has {len(now)}: files "
            "of other names cannot be compared"
        )
        result = replace(result, not_as_asked=[*result.not_as_asked, issue])
    return Reproduction(
        result,
        {name: before.get(name) == after.get(name) for name in {**before, **after}},
        describe_difference(record.platform, platform_info()),
    )


def read_recorded_run(file: Path, record: Manifest) -> RecordedRun:
    """Reads model, text and settings of the run that made a manifest.

    Raises:
        CheckpointError: it is damaged, of an older version, or the text was a Python list.
        ConfigError: settings that this version does not have.
    """
    run, given, calibration = record.run, record.given, record.run.calibration
    try:
        if given is None:
            raise ValueError("given")
        settings = {**run.config, "dynamic": dict(run.config["dynamic"])}
        if settings.get("prescale") == "none":  # earlier versions had this setting
            del settings["prescale"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} does not say how to do it again ({error}): it is damaged, or of another version"
        ) from None
    if calibration is not None and given.calibration is None:
        raise CheckpointError(
            f"{file} is of a run that was calibrated with a Python list, which it does not hold: give "
            "the same list to roundwise.quantize"
        )
    windows = CalibrationConfig()
    if calibration is not None:
        windows = CalibrationConfig(
            samples=calibration.wanted, seq_len=calibration.seq_len,
            batch_size=calibration.batch_size, seed=calibration.seed, only=calibration.only,
            special_tokens=calibration.special_tokens,
        )  # fmt: skip
    options = RunConfig(
        mode=None if run.mode == "none" else run.mode,
        device="cpu" if run.device == "cpu" else "auto",
    )
    return RecordedRun(
        QuantizeConfig(**settings), given.model, given.calibration, windows, options, run.threads
    )


def _check_model(folder: Path, file: Path, made: ModelIdentity, now: ModelIdentity) -> None:
    wrong = [name for name, digest in made.files.items() if now.files.get(name) != digest]
    wrong += [name for name in now.files if name not in made.files]
    wrong += ["config.json"] if made.config != now.config else []
    if wrong:
        raise CheckpointError(
            f"{folder} is not the model that {file} was made from: {', '.join(wrong)} differs; give the "
            "folder with that model as MODEL"
        )


def _check_text(file: Path, made: CalibrationRecord | None, now: CalibrationRecord | None) -> None:
    if made is None or now is None or made == now:
        return
    before = {text[0]: text[1] for text in made.texts}
    wrong = [name for name, digest in now.texts if before.get(name) != digest]
    if wrong:
        raise CalibrationError(
            f"{', '.join(wrong)} is not the text that {file} was calibrated with; give that one with "
            "--calibration"
        )
    differs = describe_difference(made.as_json(), now.as_json(), "calibration")
    raise CalibrationError(
        f"the calibration tokens are not those of {file}: {differs}; is the tokenizer another one?"
    )
