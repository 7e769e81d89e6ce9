"""The output folder before a run works in it: locked, refused if it is another's, emptied on request."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from roundwise.errors import OutputError
from roundwise.models.verify import MANIFEST, changed_files, read_manifest
from roundwise.models.writer import storage_error
from roundwise.pipeline.environment import difference
from roundwise.pipeline.journal import WORK, Journal


def open_folder(out: Path, source: Path, *, restart: bool) -> Journal:
    """Locks the output folder.

    Args:
        out: the folder; made if it is not there.
        source: the model's folder.
        restart: empty it first.

    Raises:
        OutputError: it is the model, holds something else, or another process works in it.
        StorageError: it cannot be emptied.
    """
    if out.resolve() == source.resolve():
        raise OutputError(f"{out} is the model itself: give another folder")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, not a folder")
    ours = (out / WORK).is_dir() or (out / MANIFEST).is_file()
    if not ours and out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} already holds something else: give an empty or new folder")
    journal = Journal(out)
    # Neither finished nor begun: an earlier --restart did not get to its end.
    if restart or not (journal.path.exists() or (out / "config.json").exists()):
        try:
            _empty(out, journal)
        except OSError as error:
            journal.close()
            raise storage_error(error, Path(error.filename or out)) from error
    return journal


def _empty(out: Path, journal: Journal) -> None:
    # What makes it a model goes first: a folder half emptied must not look finished. What says that it
    # is ours goes last: it must not look like somebody else's either.
    (out / "config.json").unlink(missing_ok=True)
    for path in [*out.iterdir(), *journal.folder.iterdir()]:
        if path.name not in (WORK, "lock", MANIFEST):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (out / MANIFEST).unlink(missing_ok=True)


def finished(
    out: Path, fingerprint: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any] | None:
    """The manifest, if this very run was completed in the output folder before.

    Args:
        out: the folder.
        fingerprint: of the run that is to be made, given that of the one that was.

    Raises:
        OutputError: it holds a checkpoint made otherwise, or one that was changed since.
        CheckpointError: its manifest is damaged.
    """
    if not (out / "config.json").exists():
        return None
    manifest = read_manifest(out)
    made = manifest["run"] if manifest else {}
    wanted = fingerprint(made)
    if manifest is None or made != wanted:
        raise OutputError(
            f"{out} holds a finished checkpoint made otherwise ({difference(made, wanted)}): give "
            "another folder, or --restart to replace it"
        )
    changed = changed_files(out, manifest["files"])
    if changed:
        raise OutputError(
            f"{out} holds a finished checkpoint that was changed since: {changed[0]}; --restart makes "
            "it again"
        )
    return manifest
