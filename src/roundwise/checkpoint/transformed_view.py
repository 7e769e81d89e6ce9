"""Tensors that are computed while they are read, and a view of a checkpoint that scales or rotates some.

Everything that reads a checkpoint reads this view the same way, so the rest of a run does not depend on
it, and only one block's weights are in memory at a time. `model/rotate.py` decides which tensors are
transformed.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from roundwise.checkpoint.reader import (
    CHUNK,
    DTYPE_CODES,
    DTYPES,
    Checkpoint,
    CheckpointView,
    TensorInfo,
)
from roundwise.core.hadamard import Rotation
from roundwise.errors import CheckpointError

#: Numbers transformed at a time, in float64: few enough for the processor's cache.
CHUNK_NUMEL = 1 << 18


@dataclass(frozen=True)
class ComputedInfo(TensorInfo):
    """A tensor that is computed whenever it is read; its location is that of a tensor it is made of."""

    compute: Callable[[], torch.Tensor]
    origins: Mapping[str, TensorInfo] = field(default_factory=dict)
    """The tensors of the files that hold its values, by name, to write them unchanged; empty: it has
    none, so its computed value is written."""
    select_rows: Callable[[int, int], TensorInfo] | None = None
    """Returns `count` rows from row `start` on without computing the others; None: not possible."""
    stored_as: str = ""
    """Format in which the files hold it quantized, such as FP8; empty: they hold it dense."""

    @classmethod
    def from_source(
        cls, source: TensorInfo, shape: tuple[int, ...], dtype: torch.dtype,
        compute: Callable[[], torch.Tensor], *, origins: Mapping[str, TensorInfo] | None = None,
        select_rows: Callable[[int, int], TensorInfo] | None = None, stored_as: str = "",
    ) -> ComputedInfo:  # fmt: skip
        """Returns the info of a computed tensor.

        Args:
            source: a tensor that it is computed from.
            shape: shape of the result.
            dtype: dtype of the result.
            compute: returns the result, in any floating point dtype.
            origins: the tensors of the files that hold its values, by name.
            select_rows: returns some of its rows.
            stored_as: format of a quantized tensor that it is made of.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        return ComputedInfo(
            source.path, DTYPE_CODES[dtype], shape, source.start, nbytes, compute, origins or {},
            select_rows, stored_as,
        )  # fmt: skip

    def memory_mapped(self, *, aligned: bool) -> tuple[torch.Tensor, mmap.mmap | None]:
        """Returns the tensor and None: it is computed, so it has no memory map."""
        value = self.compute().to(DTYPES[self.dtype])
        return value.clone(memory_format=torch.contiguous_format), None

    def prefetch(self) -> None:
        """Asks the operating system to read what the tensor is computed from in the background."""
        for info in self.origins.values():
            info.prefetch()

    def rows(self, start: int, count: int) -> TensorInfo:
        """Returns `count` rows of the tensor, from row `start` on; reading them may compute all rows."""
        if self.select_rows is not None:
            return self.select_rows(start, count)
        return ComputedInfo.from_source(
            self, (count, *self.shape[1:]), DTYPES[self.dtype],
            lambda: self.compute()[start : start + count],
        )  # fmt: skip

    def chunks(self) -> Iterator[bytes]:
        """Yields the tensor's bytes, at most `CHUNK` at a time."""
        data = self.read().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK):
            yield bytes(data[start : start + CHUNK])


@dataclass(frozen=True, eq=False)
class TensorTransform:
    """A transform of one tensor: its channels are scaled, then rotated, along one axis."""

    axis: int = -1
    """Axis of the channels: the last one, or 0 of a matrix."""
    gain: torch.Tensor | None = None
    """float64 [channels]: factor of each channel."""
    rotation: Rotation | None = None
    fill: float | None = None
    """Value of the whole tensor; None: the tensor is transformed instead."""

    def apply(self, X: torch.Tensor) -> torch.Tensor:
        """Returns the transformed rows X [rows, channels] of any dtype, in float64."""
        X = X.to(torch.float64)
        if self.gain is not None:
            X = X * self.gain
        return X if self.rotation is None else self.rotation.rows(X)


@dataclass(frozen=True)
class TransformedInfo(TensorInfo):
    """A tensor that is transformed whenever it is read; its location is that of its source."""

    source: TensorInfo
    transform: TensorTransform

    @classmethod
    def from_source(
        cls, source: TensorInfo, transform: TensorTransform, dtype: str | None = None
    ) -> TransformedInfo:
        """Returns `source` with a transform that is computed in float64 and rounded to `dtype`.

        Args:
            source: the tensor.
            transform: the transform.
            dtype: safetensors code of the result; None: that of `source`.

        Raises:
            CheckpointError: `source` is not a tensor of floating point numbers of 16 bits or more.
        """
        if source.dtype not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(
                f"{source.path.name} holds weights as {source.dtype}, which cannot be scaled or rotated:"
                " start from a checkpoint in bfloat16, float16 or float32"
            )
        code = dtype or source.dtype
        nbytes = source.nbytes // DTYPES[source.dtype].itemsize * DTYPES[code].itemsize
        return cls(source.path, code, source.shape, source.start, nbytes, source, transform)

    def memory_mapped(self, *, aligned: bool) -> tuple[torch.Tensor, mmap.mmap | None]:
        """Returns the transformed tensor and None: it is computed, so it has no memory map."""
        result = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        original = self.source.read()
        # Along axis 0 the channels of a column are transformed: rows of the transposed matrix.
        by_rows = self.transform.axis != 0 or result.ndim < 2
        flat, flat_result = (
            (T.reshape(-1, self.shape[-1]) if by_rows else T.T) for T in (original, result)
        )
        step = max(1, CHUNK_NUMEL // flat.shape[1])
        for start in range(0, len(flat), step):
            rows = slice(start, start + step)
            if self.transform.fill is None:
                flat_result[rows] = self.transform.apply(flat[rows])
            else:
                flat_result[rows] = self.transform.fill
        return result, None

    def rows(self, start: int, count: int) -> TensorInfo:
        """Returns `count` rows of the transformed tensor, from row `start` on.

        Raises:
            CheckpointError: the transform mixes rows.
        """
        if self.transform.axis == 0:
            raise CheckpointError(
                f"a tensor of {self.path.name} is transformed across its rows, so single rows cannot be "
                "read"
            )
        return TransformedInfo.from_source(
            self.source.rows(start, count), self.transform, self.dtype
        )

    def chunks(self) -> Iterator[bytes]:
        """Yields the bytes of the transformed tensor, `CHUNK` at a time."""
        pending = bytearray()
        for rows in self._row_slices():
            pending += rows.reshape(-1).view(torch.uint8).numpy().data
            while len(pending) >= CHUNK:
                yield bytes(pending[:CHUNK])
                del pending[:CHUNK]
        if pending:
            yield bytes(pending)

    def _row_slices(self) -> Iterator[torch.Tensor]:
        """Yields the transformed tensor a few rows at a time (embeddings are large), or whole."""
        if self.transform.axis == 0 or len(self.shape) < 2:
            yield self.read()
            return
        step = max(1, CHUNK * self.shape[0] // max(1, self.nbytes))
        for start in range(0, self.shape[0], step):
            yield self.rows(start, min(step, self.shape[0] - start)).read()


def stored_as(info: TensorInfo) -> str:
    """Returns the format in which the files hold a tensor quantized; empty: they hold it dense."""
    while isinstance(info, TransformedInfo):
        info = info.source
    return info.stored_as if isinstance(info, ComputedInfo) else ""


class TransformedCheckpoint(CheckpointView):
    """A view of another checkpoint in which some tensors are transformed.

    Args:
        source: the checkpoint on disk, or another view.
        transforms: transforms by tensor name.
        added: further tensors by name; `transforms` apply to them too.
        overrides: settings that replace those of config.json.
        exact: return transformed tensors in float32 instead of rounding them to their source's type.

    Raises:
        CheckpointError: a tensor to be transformed does not hold floating point numbers.
        KeyError: `transforms` names a tensor that does not exist.
    """

    def __init__(
        self,
        source: Checkpoint,
        transforms: dict[str, TensorTransform],
        *,
        added: dict[str, TensorInfo] | None = None,
        overrides: dict[str, Any] | None = None,
        exact: bool = False,
    ) -> None:
        overrides = overrides or {}
        super().__init__(
            source, {**source.tensors, **(added or {})}, {**source.config, **overrides}
        )
        self.overrides = {**source.overrides, **overrides}
        dtype = DTYPE_CODES[torch.float32] if exact else None
        for name, transform in transforms.items():
            self.tensors[name] = TransformedInfo.from_source(self.tensors[name], transform, dtype)
