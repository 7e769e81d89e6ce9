"""Journal, finished blocks and activations in the work folder of a run: a stopped run resumes from them.

    OUT/.roundwise/lock            locked by the process that works here
    OUT/.roundwise/journal.jsonl   line 1: version and fingerprint; then what is finished, in order
    OUT/.roundwise/block-N.safetensors           tensors of block N, until a shard has them
    OUT/.roundwise/activations-N-R.safetensors   outputs of block N for the batches of rank R

Lines are lists of finished blocks, and then, at the end of the run, finished shards of the checkpoint.
The run can resume after the last block of a line. The blocks' files and the activations of that last
block are on disk before the line is, so a line proves both. A shard is on disk before its line, and
the files of its blocks are removed only after it. A last line without a newline was being written when
the process died: it is ignored.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from roundwise.checkpoint.manifest import (
    BlockRecord,
    Fingerprint,
    GivenNames,
    LayerRecord,
    SavedActivations,
    ShardRecord,
    explain,
)
from roundwise.checkpoint.reader import read_header
from roundwise.checkpoint.side_files import WORK
from roundwise.checkpoint.untrusted import file_digest
from roundwise.checkpoint.writer import PARTIAL, storage_error, write_safetensors
from roundwise.errors import OutputError, RunError

#: Version of the lines; runs of another one cannot be resumed. 1 had no key and a shard per block.
VERSION = 2


@dataclass(frozen=True)
class JournalContents:
    """All complete lines of a journal."""

    fingerprint: Fingerprint | None = None
    """The run; None: none has begun."""
    blocks: tuple[BlockRecord, ...] = ()
    """Finished blocks, in order."""
    shards: tuple[ShardRecord, ...] = ()
    """Finished shards, in order."""


def block_file(index: int) -> str:
    """Returns the name of the file of block number `index` in the work folder."""
    return f"block-{index:05d}.safetensors"


def check_file(file: Path, digest: str) -> None:
    """Checks that a file is what the journal says.

    Raises:
        RunError: it is missing or was changed.
    """
    if not file.is_file() or file_digest(file) != digest:
        raise RunError(f"{file} was changed or removed since it was written: use --restart")


def read_journal(out: Path) -> JournalContents:
    """Reads the journal of an output folder; without one the contents are empty.

    Raises:
        OutputError: the journal is damaged, or of another version.
    """
    path = out / WORK / "journal.jsonl"
    if not path.exists():
        return JournalContents()
    complete, _, _torn = path.read_bytes().rpartition(b"\n")
    try:
        lines = [json.loads(line) for line in complete.splitlines()]
        if not lines:
            return JournalContents()
        first, *others = lines
        fingerprint = first["fingerprint"]
        if first.get("version") != VERSION:
            raise OutputError(
                f"{out} holds an unfinished run of another version of roundwise: start again with "
                "--restart"
            )
        shards = [line for line in others if isinstance(line, dict)]
        blocks = others[: len(others) - len(shards)]  # all before the shards
        contents = JournalContents(
            Fingerprint.model_validate(fingerprint),
            tuple(chain(*TypeAdapter(list[list[BlockRecord]]).validate_python(blocks))),
            tuple(TypeAdapter(list[ShardRecord]).validate_python(shards)),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = explain(error) if isinstance(error, ValidationError) else str(error)
        raise OutputError(f"{path} is damaged: use --restart to start again ({reason})") from None
    return contents


class Journal:
    """The journal of one output folder, and the lock on that folder.

    Args:
        out: output folder; created if it does not exist.

    Raises:
        OutputError: another process works in the folder, or it cannot be written or locked.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / WORK
        self.path = self.folder / "journal.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("a")
        except OSError as error:
            raise OutputError(f"cannot write to {out}: {error.strerror}") from None
        try:
            # The kernel releases the lock when the process ends, even if it is killed.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            if isinstance(error, BlockingIOError):
                raise OutputError(f"another roundwise process is working in {out}") from None
            # The file system has no locks, or none left. Without a lock, two runs could mix.
            raise OutputError(f"cannot lock {self.folder / 'lock'}: {error.strerror}") from None

    def read(self) -> JournalContents:
        """Returns the same as `read_journal`."""
        return read_journal(self.folder.parent)

    def layers(self) -> list[LayerRecord]:
        """Returns the records of all layers of finished blocks."""
        return [layer for block in self.read().blocks for layer in block.layers]

    def start(self, fingerprint: Fingerprint, given: GivenNames, blocks: int = 0) -> None:
        """Starts an empty journal.

        Args:
            fingerprint: decides which run may resume.
            given: where the model and the text are, for those who find the folder.
            blocks: all blocks of the model, for them too.
        """
        self.path.unlink(missing_ok=True)
        first = {"version": VERSION, "fingerprint": fingerprint.as_json(), "blocks": blocks}
        self._append({**first, "given": given.as_json()})

    def trim(self) -> None:
        """Drops an incomplete last line, incomplete files and shards that no line proves.

        The run makes these again; there may be no room for both.
        """
        complete, newline, torn = self.path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(self.path, len(complete + newline))
        out, recorded = self.folder.parent, {record.shard.name for record in self.read().shards}
        shards = [path for path in out.glob("model*.safetensors") if path.name not in recorded]
        for path in [*self.folder.glob("*" + PARTIAL), *out.glob("*" + PARTIAL), *shards]:
            path.unlink()

    def blocks_done(self, blocks: list[BlockRecord], *, keep: set[str]) -> None:
        """Records finished blocks in one line, and removes activations that are no longer needed.

        Args:
            blocks: records of the blocks.
            keep: names of the activation files that are still needed.

        Raises:
            StorageError: the disk is full or failed.
        """
        self._append([block.as_json() for block in blocks])
        for path in self.folder.glob("activations-*.safetensors"):
            if path.name not in keep:
                path.unlink()

    def shard_done(self, record: ShardRecord) -> None:
        """Records a finished shard, and removes the files of its blocks.

        Raises:
            StorageError: the disk is full or failed.
        """
        self._append(record.as_json())
        self.remove_joined(record)

    def remove_joined(self, record: ShardRecord) -> None:
        """Removes the files of the blocks in a recorded shard; a killed run may have left them."""
        for index in record.shard.blocks:
            (self.folder / block_file(index)).unlink(missing_ok=True)

    def _append(self, line: dict[str, Any] | list[dict[str, Any]]) -> None:
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(error, self.path) from error

    def check_outputs(self) -> None:
        """Checks the hashes of the activations that the run resumes from.

        Raises:
            RunError: a file is missing or was changed.
        """
        done = self.read().blocks
        saved = done[-1].activations if done else None
        for name, digest in (saved.files if saved else {}).items():
            check_file(self.folder / name, digest)

    def finish(self) -> None:
        """Removes the work folder, once the checkpoint is complete, and releases the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def close(self) -> None:
        """Releases the lock; a started run keeps its journal for resuming."""
        if not self.path.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


class _OffloadedTensors(dict[str, torch.Tensor]):
    """Tensors of batches by `KEY.PLACE`; each is in memory only while it is written."""

    onloaded: Callable[[str], AbstractContextManager[None]]

    def values(self) -> Any:
        for name, tensor in self.items():
            with self.onloaded(name.rpartition(".")[0]):
                yield tensor


def save_outputs(
    out: Path,
    index: int,
    rank: int,
    outputs: dict[str, Any],
    onloaded: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> SavedActivations | None:
    """Writes the outputs of a block for the batches of a rank.

    Args:
        out: output folder of the run.
        index: number of the block.
        rank: number of the rank; each rank writes its own file.
        outputs: key of a batch -> return value of the block: a tensor, or a tuple of tensors and None.
        onloaded: context manager that loads the tensors of a batch; see `ForwardScheduler.onloaded`.

    Returns:
        The record from which `load_outputs` reads them; None: the block returns something else, such
        as tuples in tuples (xLSTM), so a run cannot resume behind it.

    Raises:
        StorageError: the disk is full or failed.
    """
    tensors = _OffloadedTensors()
    tensors.onloaded = onloaded
    places = None
    for key, output in outputs.items():
        places = len(output) if isinstance(output, tuple) else None
        values = output if isinstance(output, tuple) else (output,)
        for place, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                tensors[f"{key}.{place}"] = value
            elif value is not None:
                return None
    name = f"activations-{index:05d}-{rank}.safetensors"
    digest = write_safetensors(out / WORK / name, tensors)
    return SavedActivations(files={name: digest}, places=places)


def load_outputs(out: Path, saved: SavedActivations) -> dict[str, Any]:
    """Returns the outputs of a block for the batches of all ranks, memory-mapped.

    Args:
        out: output folder of the run.
        saved: the record from `save_outputs`, with the files of all ranks.

    Returns:
        Key of a batch -> return value of the block.
    """
    infos: dict[str, Any] = {}
    for name in saved.files:
        infos |= read_header(out / WORK / name)
    keys = dict.fromkeys(name.rpartition(".")[0] for name in infos)
    if saved.places is None:
        return {key: infos[f"{key}.0"].read() for key in keys}
    return {
        key: tuple(
            infos[name].read() if (name := f"{key}.{place}") in infos else None
            for place in range(saved.places)
        )
        for key in keys
    }
