"""A checkpoint seen through an exact change of its weights: tensors come out folded as they are read.

Everything that reads a checkpoint reads this one the same way, so that the rest of a run knows nothing
of it, and one block's weights are in memory at a time. What may be folded is found by
`models/residual.py` and planned by `models/fold.py`; here it is done.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
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

#: Numbers that are worked on at a time, in float64: few enough for the processor's cache.
PART = 1 << 18


@dataclass(frozen=True, eq=False)
class TensorTransform:
    """What becomes of one tensor: channels scaled, then rotated, along one of its axes."""

    axis: int = -1
    """The axis of the stream's channels: the last, or 0 of a matrix."""
    gain: torch.Tensor | None = None
    """float64 [channels]: factor of each channel."""
    rotation: Rotation | None = None
    fill: float | None = None
    """The tensor becomes this number everywhere."""
    offset: float = 0.0
    """What is scaled is the tensor plus this, which is taken away again."""

    def rows(self, X: torch.Tensor) -> torch.Tensor:
        """X [rows, channels] of any dtype, changed, float64."""
        X = X.to(torch.float64)
        if self.gain is not None:
            X = (X + self.offset) * self.gain - self.offset
        return X if self.rotation is None else self.rotation.rows(X)


@dataclass(frozen=True)
class TransformedInfo(TensorInfo):
    """A tensor that is changed whenever it is read; its place is that of its source."""

    source: TensorInfo
    change: TensorTransform

    @classmethod
    def of(
        cls, source: TensorInfo, change: TensorTransform, dtype: str | None = None
    ) -> TransformedInfo:
        """`source` changed, computed in float64 and rounded to `dtype`, or to its own.

        Raises:
            CheckpointError: it holds no numbers that can be folded.
        """
        if source.dtype not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(
                f"{source.path.name} holds weights as {source.dtype}, which cannot be folded: "
                "start from a checkpoint in bfloat16, float16 or float32"
            )
        code = dtype or source.dtype
        nbytes = source.nbytes // DTYPES[source.dtype].itemsize * DTYPES[code].itemsize
        return cls(source.path, code, source.shape, source.start, nbytes, source, change)

    def memory_mapped(self, *, aligned: bool) -> tuple[torch.Tensor, mmap.mmap | None]:
        """The changed tensor; it is computed, so there is no map."""
        result = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        before = self.source.read()
        # A change along axis 0 works on the columns, which are the rows of the transposed matrix.
        by_rows = self.change.axis != 0 or result.ndim < 2
        flat, found = (
            (T.reshape(-1, self.shape[-1]) if by_rows else T.T) for T in (before, result)
        )
        step = max(1, PART // flat.shape[1])
        for start in range(0, len(flat), step):
            part = slice(start, start + step)
            if self.change.fill is None:
                found[part] = self.change.rows(flat[part])
            else:
                found[part] = self.change.fill
        return result, None

    def rows(self, start: int, count: int) -> TensorInfo:
        """Some of its rows; CheckpointError when the change mixes rows."""
        if self.change.axis == 0:
            raise CheckpointError("the rows of a tensor folded along them do not stand alone")
        return TransformedInfo.of(self.source.rows(start, count), self.change, self.dtype)

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the changed tensor, as `TensorInfo.chunks` cuts them."""
        pending = bytearray()
        for part in self._parts():
            pending += part.reshape(-1).view(torch.uint8).numpy().data
            while len(pending) >= CHUNK:
                yield bytes(pending[:CHUNK])
                del pending[:CHUNK]
        if pending:
            yield bytes(pending)

    def _parts(self) -> Iterator[torch.Tensor]:
        """The changed tensor, whole or a few rows after another: embeddings are large."""
        if self.change.axis == 0 or len(self.shape) < 2:
            yield self.read()
            return
        step = max(1, CHUNK * self.shape[0] // max(1, self.nbytes))
        for start in range(0, self.shape[0], step):
            yield self.rows(start, min(step, self.shape[0] - start)).read()


class TransformedCheckpoint(CheckpointView):
    """The tensors of another checkpoint, some of them changed.

    Args:
        source: the checkpoint as it is on the disk.
        changes: by tensor name.
        added: further tensors of the same folder, by name; changed like the others.
        overrides: what the model's config is to say instead.
        exact: changed tensors come in float32 instead of being rounded to their source's type.
    """

    def __init__(
        self,
        source: Checkpoint,
        changes: dict[str, TensorTransform],
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
        for name, change in changes.items():
            self.tensors[name] = TransformedInfo.of(self.tensors[name], change, dtype)
