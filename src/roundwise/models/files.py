"""Files of a model folder as what they are to a reader who trusts none of them: data of bounded size.

Knows JSON, hashes and links; nothing of tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from roundwise.errors import CheckpointError

#: Bytes of a JSON file; an index of a million tensors has fewer.
MAX_JSON = 256 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is missing, damaged or no object."""
    try:
        if not path.is_file():  # to read a pipe would wait for ever
            raise FileNotFoundError
        with path.open("rb") as file:
            data = file.read(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise ValueError(f"it is larger than {MAX_JSON >> 20} MiB")
        value = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}, so it is not a model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(file: Path) -> tuple[int, ...] | None:
    """What changes with a file's content, short of its content; None: it is gone."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def check_links(folder: Path, files: Iterable[Path]) -> None:
    """Refuses links to elsewhere: side files are copied, and with them what a link points to.

    A folder of the hub's cache is made of links to the files of all its revisions (../../blobs).

    Args:
        folder: of a model.
        files: some of its files.

    Raises:
        CheckpointError: one of them is a link out of the folder.
    """
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    for file in files:
        target = file.resolve() if file.is_symlink() else home
        if not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"{file} is a link to {target}, outside the folder: copy that file into the folder"
            )
