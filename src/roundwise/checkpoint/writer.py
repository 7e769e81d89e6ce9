"""Writing shards, indexes and side files so that a file is either whole under its name or not there.

Every file is written to a temporary name in the same folder, flushed to the disk and renamed. The
bytes depend only on the tensors and their order, and the hash is taken on the way.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from roundwise.checkpoint.reader import ALIGNMENT, DTYPE_CODES, TensorInfo
from roundwise.errors import StorageError

#: Suffix of files being written; whatever carries it after a crash is worthless.
PARTIAL = ".partial"


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor | TensorInfo], *, sync: bool = True
) -> str:
    """Writes one safetensors file atomically; returns its SHA-256.

    Args:
        path: final name.
        tensors: in the order in which their bytes are laid out. A `TensorInfo` is copied byte for
            byte from its file in small pieces and never held whole in memory.
        sync: flush to the disk before renaming; off only for files that can be made again.

    Raises:
        StorageError: the disk is full or failed; nothing is left under `path`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        if isinstance(tensor, TensorInfo):
            code, size = tensor.dtype, tensor.nbytes
        else:
            code, size = DTYPE_CODES[tensor.dtype], tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    digest = hashlib.sha256()
    with atomic_write(path, sync=sync) as file:
        for piece in _pieces(text, tensors.values()):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def _pieces(
    header: bytes, tensors: Iterable[torch.Tensor | TensorInfo]
) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        if isinstance(tensor, TensorInfo):
            yield from tensor.chunks()
        elif tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, keys in the order given."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half a character, which JSON can hold and UTF-8 cannot
        data = json.dumps(value, indent=2).encode()
    with atomic_write(path) as file:
        file.write(data + b"\n")


def copy_file(source: Path, path: Path) -> None:
    """Copies a file's bytes atomically."""
    with atomic_write(path) as file, source.open("rb") as original:
        shutil.copyfileobj(original, file)


@contextmanager
def atomic_write(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """A file to write whose content appears under `path` when the block ends without an error.

    Raises:
        StorageError: it could not be written, renamed or flushed; nothing is left under either name.
    """
    partial = path.with_name(path.name + PARTIAL)
    written = partial
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
        written = path
        if sync:
            sync_folder(path.parent)
    except BaseException as error:
        # What could not be made durable does not count, even if it has its name already. Where the disk
        # does not let it be removed either, the first error is the one to tell.
        with suppress(OSError):
            written.unlink()
        if isinstance(error, OSError):
            raise storage_error(error, path) from error
        raise


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(error: OSError, path: Path) -> StorageError:
    """One sentence for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"the disk is full while writing {path}: free some space and run the same command again, "
            "finished blocks are kept"
        )
    return StorageError(f"cannot write {path}: {error.strerror or error}")
