"""Reads and writes GGUF files through the `gguf` package of llama.cpp's authors.

The package is optional; it is imported only when a file is opened.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roundwise.checkpoint.writer import partial_path, storage_error, sync_folder
from roundwise.errors import CheckpointError, ConfigError
from roundwise.model.foreign_errors import foreign_errors
from roundwise.system.activity import announce
from roundwise.version import install_command

#: Types of tensors that hold plain numbers.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Types that the rest can have: the package quantizes to them, and llama.cpp computes with them.
REST_TYPES = ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
#: Rows quantized at a time.
ROWS = 4096
FILE_TYPE, QUANTIZATION_VERSION = "general.file_type", "general.quantization_version"
QUANTIZED_BY, ARCHITECTURE = "general.quantized_by", "general.architecture"


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """A tensor of a file."""

    name: str
    type: str
    """Name in GGUF, such as F16."""
    shape: tuple[int, ...]
    """As in PyTorch: the last axis has the neighbouring numbers."""
    nbytes: int
    stored: torch.Tensor
    """Its bytes, in a memory map: uint8."""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def values(self) -> torch.Tensor:
        """Returns the numbers of a tensor of one of `DTYPES`."""
        return self.stored.view(DTYPES[self.type]).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class PlannedTensor:
    """A tensor of a file to be written."""

    name: str
    type: str
    shape: tuple[int, ...]
    compute: Callable[[], torch.Tensor]
    """Returns its bytes, or its values if the type is one of `DTYPES`; called when it is written."""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return stored_bytes(self.type, self.numel)


class GgufFile:
    """A GGUF file; opening it reads its header, tensors are memory maps.

    Args:
        path: the file.

    Raises:
        ConfigError: the `gguf` package is not installed.
        CheckpointError: the file is missing or damaged, or one part of several.
    """

    def __init__(self, path: Path) -> None:
        self.path, gguf = path, load_gguf()
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        with foreign_errors(f"{path} cannot be read as a GGUF file"):
            # "c": pages that are written to are private. torch takes no read-only arrays.
            self.reader = gguf.GGUFReader(path, "c")
            architecture = self.reader.get_field(ARCHITECTURE)
            self.architecture = str(architecture.contents()) if architecture else ""
            self.tensors = {tensor.name: _tensor(tensor) for tensor in self.reader.tensors}
            split = self.reader.get_field("split.count")
            parts = int(split.contents()) if split else 1
        if not self.architecture:
            raise CheckpointError(f"{path} does not name the architecture of its model")
        if parts > 1:
            raise CheckpointError(
                f"{path} is one of {parts} parts: join them first (llama-gguf-split --merge)"
            )
        if self.reader.byte_order != "I":
            raise CheckpointError(f"{path} is a file for machines with another byte order")

    def write_like(self, out: Path, tensors: Sequence[PlannedTensor], file_type: str) -> None:
        """Writes a file with this one's metadata and other tensors, atomically.

        Args:
            out: the new file.
            tensors: all its tensors; one at a time is in memory.
            file_type: type of most weights, such as Q4_0.

        Raises:
            StorageError: the disk is full or failed; no file remains under `out`.
        """
        gguf, partial = load_gguf(), partial_path(out)
        writer = gguf.GGUFWriter(partial, self.architecture)
        writer.data_alignment = int(self.reader.alignment)
        with foreign_errors(f"the metadata of {self.path} cannot be copied"):
            for name, field in self.reader.fields.items():
                kind, *of_array = field.types
                value = field.contents()
                # Names that begin with GGUF are the reader's; an empty array cannot be written.
                if name not in _REPLACED and not name.startswith("GGUF.") and value != []:
                    writer.add_key_value(name, value, kind, *of_array[-1:])
        prefix = "ALL" if file_type == "F32" else "MOSTLY"
        writer.add_file_type(int(gguf.LlamaFileType[f"{prefix}_{file_type}"]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_quantized_by("roundwise")
        try:
            _write(writer, tensors)
            writer.close()
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, out)
            sync_folder(out.parent)
        except BaseException as error:
            writer.close()
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise storage_error(error, out) from error
            raise


#: Metadata that is not copied: the writer adds it.
_REPLACED = (ARCHITECTURE, FILE_TYPE, QUANTIZATION_VERSION, QUANTIZED_BY)


def load_gguf() -> Any:
    """Returns the `gguf` package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(f"GGUF files need the gguf package: {install_command('gguf')}") from None
    return gguf


def stored_bytes(type: str, numel: int) -> int:
    """Returns the bytes of a number of weights, whole blocks of a type."""
    gguf = load_gguf()
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    return numel // int(block) * int(nbytes)


def fits_type(type: str, columns: int) -> bool:
    """Tells whether rows of some length are whole blocks of a type."""
    gguf = load_gguf()
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    return columns % int(block) == 0


def quantize_values(values: torch.Tensor, type: str) -> torch.Tensor:
    """Returns the bytes of a matrix rounded to a type by the `gguf` package; few rows at a time.

    Args:
        values: [rows, columns], any floating point type.
        type: one of `REST_TYPES`.
    """
    gguf = load_gguf()
    kind = gguf.GGMLQuantizationType[type]
    parts = []
    for start in range(0, len(values), ROWS):
        numbers = values[start : start + ROWS].to(torch.float32).numpy()
        parts.append(torch.from_numpy(gguf.quants.quantize(numbers, kind)).view(torch.uint8))
    return torch.cat(parts)


def _tensor(tensor: Any) -> GgufTensor:
    """Returns a tensor of the package's reader as ours."""
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    stored = torch.from_numpy(tensor.data.reshape(-1).view("uint8"))
    return GgufTensor(tensor.name, tensor.tensor_type.name, shape, int(tensor.n_bytes), stored)


def _write(writer: Any, tensors: Sequence[PlannedTensor]) -> None:
    """Writes the header of a file and its tensors, one after another."""
    gguf = load_gguf()
    for tensor in tensors:
        # The type of the numbers counts only without a type of GGUF.
        writer.add_tensor_info(
            tensor.name, tensor.shape, "float32", tensor.nbytes,
            gguf.GGMLQuantizationType[tensor.type],
        )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, tensor in enumerate(tensors):
        announce("writing tensors", index, len(tensors))
        data = tensor.compute().contiguous().reshape(-1).view(torch.uint8)
        writer.write_tensor_data(data.numpy())
