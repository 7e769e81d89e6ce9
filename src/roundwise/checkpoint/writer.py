"""Writes shards, indexes and side files atomically: a file is either complete or does not exist.

Every file is written to a temporary name in the same folder, flushed to disk and renamed. The bytes
depend only on the tensors and their order; the hash is computed while writing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from roundwise.checkpoint.reader import ALIGNMENT, DTYPE_CODES, Checkpoint, TensorInfo
from roundwise.errors import StorageError

#: Suffix of files being written; files with it that remain after a crash can be deleted.
PARTIAL = ".partial"
#: Bytes of the longest file name that file systems take.
MAX_NAME = 255


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of the result that is computed only when its shard is written."""

    name: str
    nbytes: int
    """Approximate size, for dividing tensors into shards."""
    compute: Callable[[], torch.Tensor | TensorInfo]
    """Returns the tensor, or the location of one that is copied byte for byte."""

    def read(self) -> torch.Tensor:
        """Computes the tensor, or reads it from its file."""
        tensor = self.compute()
        return tensor.read() if isinstance(tensor, TensorInfo) else tensor


def copied_tensor(name: str, info: TensorInfo) -> LazyTensor:
    """Returns the lazy tensor that is copied byte for byte from its file."""
    return LazyTensor(name, info.nbytes, lambda: info)


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor | TensorInfo], *, sync: bool = True
) -> str:
    """Writes one safetensors file atomically.

    Args:
        path: final name.
        tensors: tensors by name, in the order of their bytes in the file. A `TensorInfo` is copied byte
            for byte from its file in small chunks and is never whole in memory.
        sync: flush to disk before renaming; off only for files that can be recreated.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        StorageError: the disk is full or failed; no file remains under `path`.
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
        for chunk in _file_chunks(text, tensors.values()):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _file_chunks(
    header: bytes, tensors: Iterable[torch.Tensor | TensorInfo]
) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a safetensors file: the header's length, the header, the tensors."""
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        if isinstance(tensor, TensorInfo):
            yield from tensor.chunks()
        elif tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON atomically, keys in their order.

    Raises:
        StorageError: the disk is full or failed; no file remains under `path`.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold and UTF-8 cannot
        data = json.dumps(value, indent=2).encode()
    with atomic_write(path) as file:
        file.write(data + b"\n")


def copy_file(source: Path, path: Path) -> None:
    """Copies a file atomically.

    Raises:
        StorageError: the disk is full or failed, or `source` cannot be read.
    """
    with atomic_write(path) as file, source.open("rb") as original:
        shutil.copyfileobj(original, file)


def copy_side_files(source: Checkpoint, out: Path) -> list[str]:
    """Copies the files beside the weights of a checkpoint, in their folders.

    Args:
        source: the checkpoint.
        out: folder to write.

    Returns:
        Their names, relative to the folder.

    Raises:
        StorageError: the disk is full or failed, or a file cannot be read.
    """
    names = []
    for path in source.side_files():
        name = path.relative_to(source.folder)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, out / name)
        names.append(name.as_posix())
    return names


@contextmanager
def atomic_write(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """Context manager: a file to write, which is renamed to `path` if no error was raised inside.

    Args:
        path: final name.
        sync: flush the file and its folder to disk.

    Raises:
        StorageError: the file could not be written, renamed or flushed; neither name remains.
    """
    partial = partial_path(path)
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
        # A file that could not be flushed is removed even if it has its final name already. If removing
        # it fails too, the first error is reported.
        with suppress(OSError):
            written.unlink()
        if isinstance(error, OSError):
            raise storage_error(error, path) from error
        raise


def partial_path(path: Path) -> Path:
    """Returns the temporary name of a file that is being written; a hash replaces a long name."""
    name = path.name
    if len(os.fsencode(name + PARTIAL)) > MAX_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(name + PARTIAL)


def sync_folder(folder: Path) -> None:
    """Flushes a folder to disk, so that renames in it survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(error: OSError, path: Path) -> StorageError:
    """Returns the StorageError that describes a failed write.

    Args:
        error: the operating system's error.
        path: the file that was being written.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"the disk is full while writing {path}: free some space and run the same command again, "
            "finished blocks are kept"
        )
    return StorageError(f"cannot write {path}: {error.strerror or error}")
