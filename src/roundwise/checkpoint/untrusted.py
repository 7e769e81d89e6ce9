"""Checks on the files of a model folder, which may be damaged or malicious.

JSON is read up to a bounded size, symbolic links must not leave the folder, and a config must not ask
for unbounded work: a model is built from it without memory for its weights, but each layer is a Python
object, each list of layer types a Python list, and each computed table takes real memory.

This module knows JSON, hashes, links and configs; `reader.py` reads tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from roundwise.errors import CheckpointError

#: Names of settings that count parts of a model, except for those that match `SIZE_NAMES`.
COUNT_NAMES = "layer|block|depth|expert|stage|stack|codebook"
SIZE_NAMES = "size|dim|width|len|capacity|token|theta"
#: Largest accepted count: Doge has 16384 experts, each a row of a table.
MAX_COUNT = 20_000
#: Largest accepted number of classes: transformers makes a list of their names.
MAX_LABELS = 1_000_000
#: A model may have MODULES_PER_TENSOR modules for each tensor in its files, and BASE_MODULES more.
MODULES_PER_TENSOR, BASE_MODULES = 16, 10_000
#: Maximum bytes of the buffers that a model computes instead of storing: rotary frequencies, masks.
MAX_COMPUTED_BYTES = 1 << 30


def check_config(config: dict[str, Any]) -> None:
    """Refuses a config with implausible counts, or one that would run code from the hub.

    Args:
        config: the parsed config.json.

    Raises:
        CheckpointError: a count is larger than `MAX_COUNT`, or an implementation names a kernel on the
            hub, which transformers would download and run even without `trust_remote_code`.
    """
    pending: list[tuple[str, Any]] = list(config.items())
    while pending:  # no recursion: the data may be nested as deeply as its parser allows
        key, value = pending.pop()
        if isinstance(value, dict):
            # An implementation may be a dict with one entry per part of the model.
            inherited = key if key.endswith("_implementation") else None
            pending += [(inherited or child, item) for child, item in value.items()]
        elif isinstance(value, list):
            pending += [(key, item) for item in value]
        elif isinstance(value, int | float) and value > MAX_COUNT and _is_count(key):
            raise CheckpointError(
                f"config.json says {key}={value}, but no known model has more than {MAX_COUNT}"
            )
        elif isinstance(value, int | float) and key == "num_labels" and value > MAX_LABELS:
            raise CheckpointError(
                f"config.json says num_labels={value}, but no known model has more than {MAX_LABELS}"
            )
        elif isinstance(value, str) and "/" in value and key.endswith("_implementation"):
            raise CheckpointError(
                f"config.json says {key}={value[:80]!r}: code from the hub is not run, remove it"
            )


def _is_count(key: str) -> bool:
    """Tells whether a setting counts parts of a model, such as num_hidden_layers."""
    return re.search(COUNT_NAMES, key) is not None and re.search(SIZE_NAMES, key) is None


@contextmanager
def limit_module_count(tensors: int) -> Iterator[None]:
    """Context manager: limits the number of modules of a model that is built inside.

    Args:
        tensors: number of tensors in the model's files.

    Raises:
        CheckpointError: the config asks for far more modules than the files could fill.
    """
    limit = BASE_MODULES + MODULES_PER_TENSOR * tensors
    count = 0

    def hook(*_: object) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise CheckpointError(
                f"config.json asks for more than {limit} modules, but the files hold {tensors} tensors: "
                "does config.json belong to another model?"
            )

    handle = register_module_module_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def check_computed_buffers(model: Any) -> None:
    """Checks the size of the buffers that a model on the meta device computes instead of loading.

    Raises:
        CheckpointError: they take more than `MAX_COMPUTED_BYTES`.
    """
    total = sum(buffer.nbytes for _, buffer in model.named_non_persistent_buffers())
    if total > MAX_COMPUTED_BYTES:
        raise CheckpointError(
            f"config.json asks for {total / 1e9:.0f} GB of computed buffers, such as masks and rotary "
            "frequencies: check max_position_embeddings"
        )


def parse_model_dtype(name: object) -> torch.dtype:
    """Returns the floating point type that a config names, such as "bfloat16".

    Raises:
        CheckpointError: torch has no floating point type of that name.
    """
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(
            f"config.json says dtype {str(name)[:40]!r}: it must be a floating point type"
        )
    return dtype


#: Maximum bytes of a JSON file; an index of a million tensors is smaller.
MAX_JSON = 256 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        CheckpointError: the file is missing, larger than `MAX_JSON`, damaged, or not a JSON object.
    """
    try:
        if not path.is_file():  # reading a named pipe would block forever
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
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_state(file: Path) -> tuple[int, ...] | None:
    """Returns (device, inode, size, modification time) to detect a changed file; None: it is missing."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_links(folder: Path, files: Iterable[Path]) -> None:
    """Refuses links that leave the folder: side files are copied, so a link could leak another file.

    A snapshot in the hub's cache is allowed to link to the cache's files in ../../blobs.

    Args:
        folder: folder of a model.
        files: files in it that will be read.

    Raises:
        CheckpointError: a file is a link out of the folder.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    for file in files:
        target = file.resolve() if file.is_symlink() else root
        if not any(target.is_relative_to(parent) for parent in allowed):
            raise CheckpointError(
                f"{file} is a link to {target}, outside the folder: copy that file into the folder"
            )
