"""Where batches wait when the device has no room for all of them: on the host.

The frames of a waiting batch hold what its block was called with, and nobody can let go of that but the
frames themselves. So the tensors stay, and the memory behind them moves.

Where batches wait when the CPU's own memory has no room for all of them: in a file.

A batch that waits in the middle of a block holds tensors in the frames of the model's own code, which
nobody else can let go of. So the tensors stay, and the memory behind them goes: its bytes are written to
a file, the storage is emptied, and filled again when the batch goes on. Views share a storage, and need
not know.

Only what belongs to one batch may go: large floating-point tensors in its frames that no module
holds. What is not found (temporaries of an expression) stays in memory.
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


class CpuOffload:
    """Moves what players hold in front of and behind a block.

    Args:
        device: where players play.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark_shared(self) -> None:
        """Nothing to see: only what a block was called with leaves."""

    def onloaded(self, player: PausedBatch) -> AbstractContextManager[None]:
        """Nothing to do: what a player that waits holds can be looked at, on the host."""
        return nullcontext()

    def close(self) -> None:
        """Nothing to give up."""

    def offload(self, player: PausedBatch) -> None:
        """Takes the tensors of a player that waits to the host."""
        for x in _hidden(player.block_inputs):
            x.data = x.to(HOST)
        player.output = to_device(player.output, HOST)

    def onload(self, player: PausedBatch) -> None:
        """Brings back what a player goes on with; behind a block that is its output alone."""
        for x in _hidden(player.block_inputs if player.stopped_at != EXIT else None):
            x.data = x.to(self.device)


def _hidden(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that are as large as a batch: tokens and masks of two axes may be others' too."""
    if isinstance(value, torch.Tensor):
        if value.ndim > 2 and value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _hidden([*value.values()])
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _hidden(each)


#: Bytes below which a tensor is not worth it.
LEAST = 1 << 20
#: Containers in containers that are looked into.
DEPTH = 6


class DiskOffload:
    """A file without a name: it ends with the process, however that ends.

    Args:
        folder: where there is room for it.
        model: whatever its modules hold belongs to all batches.
        tight: memory that a batch has left is returned to the system before the next one comes.
    """

    def __init__(self, folder: Path, model: nn.Module, *, tight: bool = False) -> None:
        self.folder, self.model, self.tight = folder, model, tight
        try:
            self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise storage_error(error, folder) from error
        self.end = 0
        self._free: dict[int, list[int]] = {}
        self._away: dict[int, tuple[StorageWeakRef, int, int]] = {}
        """Storage -> itself, its size and its place in the file."""
        self._of: dict[str, set[int]] = {}
        """What each player has left there."""
        self._shared: set[int] = set()

    def mark_shared(self) -> None:
        """Notes what modules hold, before a block is played."""
        found: list[Any] = []
        for module in self.model.modules():
            found += [v for k, v in vars(module).items() if k not in ("_modules", "_parameters")]
            found += module._parameters.values()
        self._shared = {_key(tensor) for tensor in _tensors(found, DEPTH)}

    def offload(self, player: PausedBatch) -> None:
        """Empties what a player that waits holds, and what its twin holds for it."""
        self._of.setdefault(player.key, set()).update(self._empty(player))
        if player.reference is not None and not player.is_reference:
            self._of.setdefault(player.reference.key, set()).update(self._empty(player.reference))
        if self.tight:
            trim_heap()

    def onload(self, player: PausedBatch) -> None:
        """Fills again what a player goes on with, and what its twin holds for it."""
        for key in self._of.pop(player.key, set()):
            self._fill(key)
        if player.reference is not None and not player.is_reference:
            for tensor in _tensors([*player.reference.reference_activations.values()], DEPTH):
                self._fill(_key(tensor))

    @contextmanager
    def onloaded(self, player: PausedBatch) -> Iterator[None]:
        """While it is entered, what a waiting player holds can be looked at."""
        self.onload(player)
        try:
            yield
        finally:
            self.offload(player)

    def close(self) -> None:
        """Gives up the file and what is in it."""
        self.file.close()

    def _empty(self, player: PausedBatch) -> Iterator[int]:
        """Writes and empties the storages of a player; the keys of those that are away by now."""
        held = [
            *_locals(player),
            player.reference_activations,
            player.residual_inputs,
            player.output,
        ]
        for tensor in _tensors(held, DEPTH):
            storage, key = tensor.untyped_storage(), _key(tensor)
            size = storage.nbytes()
            if key in self._away or key in self._shared or isinstance(tensor, nn.Parameter):
                continue
            if size < LEAST or not tensor.is_floating_point():
                continue
            if not storage.resizable():  # it is mapped from a file already
                madvise(storage.data_ptr(), size, PAGEOUT)
                continue
            free = self._free.get(size)
            place = free.pop() if free else self.end
            self.end = max(self.end, place + size)
            self._transfer(storage, size, place, out=True)
            storage.resize_(0)
            self._away[key] = StorageWeakRef(storage), size, place  # type: ignore[no-untyped-call]
            yield key

    def _fill(self, key: int) -> None:
        if key not in self._away:
            return
        ref, size, place = self._away.pop(key)
        if not ref.expired():  # type: ignore[no-untyped-call]
            storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
            storage.resize_(size)
            madvise(storage.data_ptr(), size, HUGE)
            self._transfer(storage, size, place, out=False)
        self._free.setdefault(size, []).append(place)

    def _transfer(self, storage: torch.UntypedStorage, size: int, place: int, *, out: bool) -> None:
        """All bytes of a storage to a place in the file, or back."""
        # Not by way of numpy: torch lets no storage be emptied that numpy has seen.
        view = memoryview((ctypes.c_ubyte * size).from_address(storage.data_ptr()))
        done, file = 0, self.file.fileno()
        while done < size:
            part = view[done:]
            try:
                to_device = (
                    os.pwrite(file, part, place + done)
                    if out
                    else os.preadv(file, [part], place + done)
                )
            except OSError as error:
                raise storage_error(error, self.folder) from error
            if not to_device:
                raise RunError(f"a file in {self.folder} is shorter than what was written to it")
            done += to_device


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _locals(player: PausedBatch) -> Iterator[Any]:
    """The local variables of a player's frames, from the innermost out."""
    frame = player.task.gr_frame if player.task else None
    while frame is not None:
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            values = frame.f_locals
            yield [*values.values()]
            if isinstance(values, dict):  # a snapshot, which would hold on to them (Python < 3.13)
                values.clear()
        frame = frame.f_back


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """The tensors in a value, however deep in containers."""
    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu" and value.layout == torch.strided:
            yield value
    elif depth and isinstance(value, dict):
        yield from _tensors([*value.values()], depth - 1)
    elif depth and isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each, depth - 1)
    elif depth and is_dataclass(value) and not isinstance(value, type | PausedBatch):
        yield from _tensors([getattr(value, f.name) for f in fields(value)], depth - 1)


def choose_offload(
    streamed: StreamedModel, folder: Path, *, tight: bool
) -> CpuOffload | DiskOffload:
    """Where batches wait for which memory has no room: in a file in `folder`, or on the host."""
    if streamed.device == HOST:
        return DiskOffload(folder, streamed.model, tight=tight)
    return CpuOffload(streamed.device)
