"""What a config may cost before its weights are looked at: it is data, and may claim anything.

A model is built from it without memory for its weights, but each layer is a Python object, each list of
layer types a Python list, and each computed table real memory.

Files of a model folder as what they are to a reader who trusts none of them: data of bounded size.

Knows JSON, hashes and links; nothing of tensors.
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

#: Names of settings that count what a model is made of, those of its sizes among them, and the largest
#: count taken for one: Doge has 16384 experts, each a row of a table.
COUNTS, SIZES = "layer|block|depth|expert|stage|stack|codebook", "size|dim|width|len|capacity|token"
LARGEST = 20_000
#: Modules that a model may have for each tensor in its files, and beyond.
PER_TENSOR, MODULES = 16, 10_000
#: Bytes of tables that a model computes instead of storing: rotary frequencies, masks.
COMPUTED = 1 << 30


def check_config(config: dict[str, Any]) -> None:
    """Refuses a config that no model has, or that asks for code.

    Raises:
        CheckpointError: it counts too much of something, or names a kernel on the hub, which would be
            downloaded and run without `trust_remote_code`.
    """
    left: list[tuple[str, Any]] = list(config.items())
    while left:  # no recursion: the data may be nested as deeply as its parser allows
        key, value = left.pop()
        if isinstance(value, dict):
            # What an implementation is chosen for is named below the setting.
            inherit = key if key.endswith("_implementation") else None
            left += [(inherit or below, item) for below, item in value.items()]
        elif isinstance(value, list):
            left += [(key, item) for item in value]
        elif isinstance(value, int | float) and value > LARGEST and _counts(key):
            raise CheckpointError(f"config.json says {key}={value}, which no model has")
        elif isinstance(value, str) and "/" in value and key.endswith("_implementation"):
            raise CheckpointError(
                f"config.json says {key}={value[:80]!r}: code from the hub is not run, take it out"
            )


def _counts(key: str) -> bool:
    return re.search(COUNTS, key) is not None and re.search(SIZES, key) is None


@contextmanager
def limit_module_count(tensors: int) -> Iterator[None]:
    """While a model is built: ends it when it grows beyond what its files could fill.

    Args:
        tensors: in its files.

    Raises:
        CheckpointError: the config asks for far more modules than there are tensors.
    """
    left = MODULES + PER_TENSOR * tensors

    def hook(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise CheckpointError(
                f"config.json asks for more than {MODULES + PER_TENSOR * tensors} modules, but the "
                f"files hold {tensors} tensors: is it another model's?"
            )

    handle = register_module_module_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def check_computed_buffers(model: Any) -> None:
    """Raises CheckpointError when a model on the meta device computes tables beyond COMPUTED bytes."""
    total = sum(buffer.nbytes for _, buffer in model.named_non_persistent_buffers())
    if total > COMPUTED:
        raise CheckpointError(
            f"config.json asks for {total / 1e9:.0f} GB of tables that are computed, such as masks and "
            "rotary frequencies: is its longest text right?"
        )


def parse_model_dtype(name: object) -> torch.dtype:
    """The floating point type that a config names.

    Raises:
        CheckpointError: there is none of that name.
    """
    found = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(
            f"config.json says dtype {str(name)[:40]!r}: it must be a floating point type"
        )
    return found


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


def file_state(file: Path) -> tuple[int, ...] | None:
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
