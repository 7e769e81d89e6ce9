"""Offloads paused batches that do not fit into memory: from an accelerator to its host, or to a file.

A batch that is paused inside a block holds tensors in the stack frames of the model's own code, and only
those frames can release them. So the tensors stay, and the memory behind them moves.

- `CpuOffload` moves the tensors of a batch to the host, in block mode: those a block was called with.
- `DiskOffload` writes the bytes of a tensor to a file, empties its storage, and fills it again before
  the batch resumes. Views share a storage, so they need no care.

Only tensors of one batch may be offloaded: large floating-point tensors in its frames that no module
holds. Tensors that are not found (temporaries of an expression) stay in memory.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from roundwise.checkpoint.writer import storage_error
from roundwise.errors import RunError
from roundwise.forward.batch import EXIT, PausedBatch
from roundwise.model.streamed import StreamedModel
from roundwise.system.device import HOST, to_device
from roundwise.system.madvise import HUGE, PAGEOUT, madvise
from roundwise.system.memory import trim_heap

#: Smallest tensor in bytes that is written to a file.
MIN_BYTES = 1 << 20
#: Levels of nested containers that are searched for tensors.
MAX_DEPTH = 6


def choose_offload(
    streamed: StreamedModel, folder: Path, *, tight: bool
) -> CpuOffload | DiskOffload:
    """Returns the offload for the model's device.

    Args:
        streamed: the model.
        folder: folder for the file, if the CPU computes.
        tight: see `DiskOffload`.
    """
    if streamed.device == HOST:
        return DiskOffload(folder, streamed.model, tight=tight)
    return CpuOffload(streamed.device)


class CpuOffload:
    """Moves the tensors of paused batches between an accelerator and its host.

    Args:
        device: the accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark_shared(self) -> None:
        """No-op: only the arguments and the output of a block are moved."""

    def onloaded(self, batch: PausedBatch) -> AbstractContextManager[None]:
        """No-op: tensors on the host can be read directly."""
        return nullcontext()

    def close(self) -> None:
        """No-op: there is no file."""

    def offload(self, batch: PausedBatch) -> None:
        """Moves the tensors of a paused batch to the host."""
        for x in _activations(batch.block_inputs):
            x.data = x.to(HOST)
        batch.output = to_device(batch.output, HOST)

    def onload(self, batch: PausedBatch) -> None:
        """Moves the tensors that a batch resumes with back to the accelerator.

        After a block that is its output alone, which the block's wrapper moves.
        """
        for x in _activations(batch.block_inputs if batch.stopped_at != EXIT else None):
            x.data = x.to(self.device)


def _activations(value: Any) -> Iterator[torch.Tensor]:
    """Yields the activations in nested containers; tensors with two axes may belong to other batches."""
    if isinstance(value, torch.Tensor):
        if value.ndim > 2 and value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _activations([*value.values()])
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _activations(item)


class DiskOffload:
    """Writes the tensors of paused batches to an unnamed file, which disappears with the process.

    Args:
        folder: folder of the file.
        model: tensors that its modules hold belong to all batches and are not offloaded.
        tight: return the memory of each offloaded batch to the system before the next batch resumes.

    Raises:
        StorageError: the file cannot be created.
    """

    def __init__(self, folder: Path, model: nn.Module, *, tight: bool = False) -> None:
        self.folder, self.model, self.tight = folder, model, tight
        try:
            self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise storage_error(error, folder) from error
        self.end = 0
        self._free_places: dict[int, list[int]] = {}
        """Size -> offsets in the file where a storage of that size fits."""
        self._offloaded: dict[int, tuple[StorageWeakRef, int, int]] = {}
        """Key of a storage -> weak reference to it, size, and offset in the file."""
        self._keys_of_batch: dict[str, set[int]] = {}
        """Key of a batch -> keys of its offloaded storages."""
        self._shared: set[int] = set()
        """Keys of the storages that modules hold."""

    def mark_shared(self) -> None:
        """Finds the tensors that modules hold; called before a block runs."""
        held: list[Any] = []
        for module in self.model.modules():
            held += [v for k, v in vars(module).items() if k not in ("_modules", "_parameters")]
            held += module._parameters.values()
        self._shared = {_storage_key(tensor) for tensor in _tensors(held, MAX_DEPTH)}

    def offload(self, batch: PausedBatch) -> None:
        """Empties the storages of a paused batch, and those that its reference holds for it."""
        self._keys_of_batch.setdefault(batch.key, set()).update(self._empty_storages(batch))
        reference = batch.reference
        if reference is not None and not batch.is_reference:
            self._keys_of_batch.setdefault(reference.key, set()).update(
                self._empty_storages(reference)
            )
        if self.tight:
            trim_heap()

    def onload(self, batch: PausedBatch) -> None:
        """Fills the storages that a batch resumes with, and those that its reference holds for it."""
        for key in self._keys_of_batch.pop(batch.key, set()):
            self._fill_storage(key)
        if batch.reference is not None and not batch.is_reference:
            for tensor in _tensors([*batch.reference.reference_activations.values()], MAX_DEPTH):
                self._fill_storage(_storage_key(tensor))

    @contextmanager
    def onloaded(self, batch: PausedBatch) -> Iterator[None]:
        """Context manager: the tensors of a paused batch are in memory."""
        self.onload(batch)
        try:
            yield
        finally:
            self.offload(batch)

    def close(self) -> None:
        """Deletes the file."""
        self.file.close()

    def _empty_storages(self, batch: PausedBatch) -> Iterator[int]:
        """Writes and empties the storages of a batch; yields their keys."""
        held = [
            *_local_variables(batch),
            batch.reference_activations,
            batch.residual_inputs,
            batch.output,
        ]
        for tensor in _tensors(held, MAX_DEPTH):
            storage, key = tensor.untyped_storage(), _storage_key(tensor)
            size = storage.nbytes()
            if key in self._offloaded or key in self._shared or isinstance(tensor, nn.Parameter):
                continue
            if size < MIN_BYTES or not tensor.is_floating_point():
                continue
            if not storage.resizable():  # it is already mapped from a file
                madvise(storage.data_ptr(), size, PAGEOUT)
                continue
            free = self._free_places.get(size)
            offset = free.pop() if free else self.end
            self.end = max(self.end, offset + size)
            self._transfer(storage, size, offset, to_file=True)
            storage.resize_(0)
            self._offloaded[key] = StorageWeakRef(storage), size, offset  # type: ignore[no-untyped-call]
            yield key

    def _fill_storage(self, key: int) -> None:
        """Reads a storage back; only frees its place in the file if no tensor uses it any more."""
        if key not in self._offloaded:
            return
        reference, size, offset = self._offloaded.pop(key)
        if not reference.expired():  # type: ignore[no-untyped-call]
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            storage.resize_(size)
            madvise(storage.data_ptr(), size, HUGE)
            self._transfer(storage, size, offset, to_file=False)
        self._free_places.setdefault(size, []).append(offset)

    def _transfer(
        self, storage: torch.UntypedStorage, size: int, offset: int, *, to_file: bool
    ) -> None:
        """Copies all bytes of a storage to an offset in the file, or back.

        Raises:
            StorageError: the disk is full or failed.
            RunError: the file is shorter than what was written.
        """
        # Not via numpy: torch cannot empty a storage that numpy has seen.
        view = memoryview((ctypes.c_ubyte * size).from_address(storage.data_ptr()))
        done, file = 0, self.file.fileno()
        while done < size:
            rest, position = view[done:], offset + done
            try:
                count = (
                    os.pwrite(file, rest, position)
                    if to_file
                    else os.preadv(file, [rest], position)
                )
            except OSError as error:
                raise storage_error(error, self.folder) from error
            if not count:
                raise RunError(f"a file in {self.folder} is shorter than what was written to it")
            done += count


def _storage_key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _local_variables(batch: PausedBatch) -> Iterator[Any]:
    """Yields the local variables of each of a batch's frames, from the innermost out."""
    frame = batch.task.gr_frame if batch.task else None
    while frame is not None:
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            values = frame.f_locals
            yield [*values.values()]
            if isinstance(values, dict):  # a snapshot, which would keep them alive (Python < 3.13)
                values.clear()
        frame = frame.f_back


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """Yields the CPU tensors in nested containers and dataclasses, down to `depth` levels."""
    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu" and value.layout == torch.strided:
            yield value
    elif depth and isinstance(value, dict):
        yield from _tensors([*value.values()], depth - 1)
    elif depth and isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item, depth - 1)
    elif depth and is_dataclass(value) and not isinstance(value, type | PausedBatch):
        yield from _tensors([getattr(value, f.name) for f in fields(value)], depth - 1)
