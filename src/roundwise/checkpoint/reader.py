"""Reads a Hugging Face checkpoint tensor by tensor, each through a memory map of its own bytes.

Only safetensors are read: nothing is unpickled and no model code runs. The memory map of a tensor exists
only as long as the tensor, so a block's weights take memory only while they are in use.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from roundwise.checkpoint.side_files import explain_missing_config, find_side_files
from roundwise.checkpoint.untrusted import (
    check_config,
    check_links,
    file_digest,
    file_state,
    read_json,
)
from roundwise.errors import CheckpointError, quoted

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
#: Bytes copied or hashed at a time.
CHUNK = 8 << 20
#: Alignment of tensors in memory, in bytes; torch's own allocations have it too.
ALIGNMENT = 64


@dataclass(frozen=True)
class TensorInfo:
    """Location, type and shape of a tensor in a file."""

    path: Path
    dtype: str
    """safetensors code, such as BF16."""
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte in the file."""
    nbytes: int

    def read(self) -> torch.Tensor:
        """Returns the tensor in a private memory map: writing to it does not change the file.

        Raises:
            CheckpointError: torch does not know the type, or the file was changed or removed.
        """
        return self.memory_mapped(aligned=True)[0]

    def memory_mapped(self, *, aligned: bool) -> tuple[torch.Tensor, mmap.mmap | None]:
        """Returns the tensor and its private memory map, so that the caller can release the pages.

        Args:
            aligned: copy the tensor if the file does not align it to `ALIGNMENT`; a copy has no map.

        Raises:
            CheckpointError: torch does not know the type, or the file was changed or removed.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path.name} holds a tensor of unsupported type {self.dtype}"
            )
        dtype = DTYPES[self.dtype]
        if not self.nbytes:
            return torch.empty(self.shape, dtype=dtype), None
        page = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        try:
            with self.path.open("rb") as file:
                view = mmap.mmap(
                    file.fileno(), self.start - page + self.nbytes,
                    access=mmap.ACCESS_COPY, offset=page,
                )  # fmt: skip
        except (OSError, ValueError) as error:  # ValueError: the file is now too short
            raise CheckpointError(
                f"{self.path} cannot be read because it was changed since it was opened: {error}"
            ) from None
        offset = self.start - page
        if offset % (ALIGNMENT if aligned else dtype.itemsize):
            # Kernels may sum unaligned data in another order. The copy makes equal weights give equal
            # results at any offset in the file.
            copy = torch.empty(self.shape, dtype=dtype)
            copy.view(-1).view(torch.uint8).numpy()[:] = memoryview(view)[
                offset : offset + self.nbytes
            ]
            return copy, None
        count = self.nbytes // dtype.itemsize
        flat = torch.frombuffer(view, dtype=dtype, count=count, offset=offset)
        return flat.reshape(self.shape), view

    def prefetch(self) -> None:
        """Asks the operating system to read the tensor in the background, if it supports that."""
        advise = getattr(os, "posix_fadvise", None)
        if advise is not None:
            with suppress(OSError), self.path.open("rb") as file:
                advise(file.fileno(), self.start, self.nbytes, os.POSIX_FADV_WILLNEED)

    def rows(self, start: int, count: int) -> TensorInfo:
        """Returns the location of `count` rows of the tensor, from row `start` on.

        Raises:
            CheckpointError: the tensor is computed in a way that mixes rows (subclasses only).
        """
        row_bytes = self.nbytes // self.shape[0]
        return replace(
            self,
            shape=(count, *self.shape[1:]),
            start=self.start + start * row_bytes,
            nbytes=count * row_bytes,
        )

    def chunks(self) -> Iterator[bytes]:
        """Yields the raw bytes, at most `CHUNK` at a time.

        Raises:
            CheckpointError: the file was removed or cut.
        """
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
        with file:
            file.seek(self.start)
            remaining = self.nbytes
            while remaining:
                chunk = file.read(min(CHUNK, remaining))
                if not chunk:
                    raise CheckpointError(f"{self.path} ends in the middle of a tensor")
                remaining -= len(chunk)
                yield chunk


class Checkpoint:
    """A folder with config.json and safetensors files; opening it loads no tensor.

    Args:
        folder: a local folder.
        config_file: name of its config; only an unfinished run uses another one.

    Raises:
        CheckpointError: there is no folder, config.json or safetensors file, a shard is damaged or
            missing, or an index or a link points outside the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], *, config_file: str = "config.json") -> None:
        self.folder, self.config_file = Path(folder), config_file
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder with a model")
        if not (self.folder / config_file).exists():
            raise explain_missing_config(self.folder)
        self.config = read_json(self.folder / config_file)
        check_config(self.config)
        #: Settings that replace those of config.json when the model is built.
        self.overrides: dict[str, Any] = {}
        self.files = self._weight_files()
        check_links(self.folder, [self.folder / config_file, *self.files])
        self.side_files()  # raises for links out of the folder
        self._states = {file: file_state(file) for file in self.files}
        self._identity: dict[str, Any] | None = None
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, info in read_header(file).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"tensor {name} is both in {self.tensors[name].path.name} and {file.name}"
                    )
                self.tensors[name] = info
        if not self.tensors:
            raise CheckpointError(f"{self.folder} has no tensors in its safetensors files")

    def _weight_files(self) -> list[Path]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
                raise CheckpointError(f"{index} has no weight_map from tensor to file names")
            files = sorted({self._file_in_folder(name) for name in names.values()})
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise CheckpointError(
                    f"{self.folder} lacks {', '.join(missing)}, which its index names"
                )
            return files
        if (self.folder / SINGLE_FILE).is_file():
            return [self.folder / SINGLE_FILE]
        files = sorted(file for file in self.folder.glob("*.safetensors") if file.is_file())
        if len(files) == 1:  # names of older tools, such as gptq_model-4bit-128g.safetensors
            return files
        if files:
            raise CheckpointError(
                f"{self.folder} has {len(files)} safetensors files and no {INDEX_FILE}"
            )
        pickles = sorted([*self.folder.glob("*.bin"), *self.folder.glob("*.pt")])
        if pickles:
            raise CheckpointError(
                f"{self.folder} has only pickled weights ({pickles[0].name}), which can run code when "
                "opened: convert it with transformers, from_pretrained(...) then save_pretrained(...)"
            )
        raise CheckpointError(f"{self.folder} has no safetensors files")

    def _file_in_folder(self, name: str) -> Path:
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"the index of {self.folder} names {name!r}, outside the folder")
        return self.folder / name

    def side_files(self) -> list[Path]:
        """Returns the files beside the weights that belong to the model, such as the tokenizer's."""
        return [*find_side_files(self.folder, self.files).carried]

    def left_out(self) -> list[str]:
        """Returns a line that names the files that are not carried over to a result; empty if none."""
        names = [quoted(name)[1:-1] for name in find_side_files(self.folder, self.files).left_out]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        line = f"not carried over from {self.folder}: {', '.join(names[:10])}{more}"
        return [line] if names else []

    def nbytes(self) -> int:
        """Returns the bytes of all tensors in the folder."""
        return sum(info.nbytes for info in self.tensors.values())

    def identity(self) -> dict[str, Any]:
        """Returns SHA-256 hashes of config.json and all weight files, to detect a changed checkpoint.

        The first call reads every byte, several files in parallel; the result is kept.
        """
        if self._identity is None:
            config = json.dumps(self.config, sort_keys=True).encode()
            with ThreadPoolExecutor(min(len(self.files), os.cpu_count() or 1)) as pool:
                digests = list(pool.map(file_digest, self.files))
            files = {file.name: digest for file, digest in zip(self.files, digests, strict=True)}
            self._identity = {"config": hashlib.sha256(config).hexdigest(), "files": files}
        return self._identity

    def check_unchanged(self) -> None:
        """Checks that no weight file was changed or replaced since the checkpoint was opened.

        Raises:
            CheckpointError: one was.
        """
        for file, before in self._states.items():
            if file_state(file) != before:
                raise CheckpointError(f"{file} was changed while it was being read")


class CheckpointView(Checkpoint):
    """A checkpoint with some tensors or settings of another one replaced.

    Args:
        source: the checkpoint on disk, or another view.
        tensors: all tensors of the view.
        config: config.json of the view; None: that of `source`.
    """

    def __init__(
        self,
        source: Checkpoint,
        tensors: dict[str, TensorInfo],
        config: dict[str, Any] | None = None,
    ) -> None:
        self.source, self.folder, self.files = source, source.folder, source.files
        self.config_file = source.config_file
        self.config = source.config if config is None else config
        self.overrides = source.overrides
        self.tensors = tensors

    def nbytes(self) -> int:
        """Returns the bytes of all tensors in the folder on disk, not of the view."""
        return self.source.nbytes()

    def identity(self) -> dict[str, Any]:
        """Returns the identity of the source: it and the run's settings determine the view."""
        return self.source.identity()

    def check_unchanged(self) -> None:
        """Checks that no file of the source was changed; Raises as `Checkpoint.check_unchanged`."""
        self.source.check_unchanged()


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Returns the name and location of each tensor of one safetensors file.

    Raises:
        CheckpointError: the safetensors library does not accept the file.
    """
    try:
        with safe_open(file, framework="pt"):
            header = _header_bytes(file)
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: mapping it failed
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from None
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    base = 8 + len(header)
    return {
        name: TensorInfo(
            path=file,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=base + entry["data_offsets"][0],
            nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    }


def _header_bytes(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little"))
