"""The work folder of a run: lock, journal, activations. What makes a run resumable.

    OUT/.roundwise/lock            held by the process that works here
    OUT/.roundwise/journal.jsonl   line 1: fingerprint; then lists of finished blocks, one after another
    OUT/.roundwise/activations-N-R.safetensors   what block N returned to the batches of rank R

A line ends with a block that a run can go on behind. Its shards and the activations of that block are on
the disk before the line is, so a line is proof of both. A last line without a newline was being
written when the process died: it does not count.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from roundwise.checkpoint.manifest import WORK, BlockRecord, Fingerprint, validation_error
from roundwise.checkpoint.reader import read_header
from roundwise.checkpoint.untrusted import file_digest
from roundwise.checkpoint.writer import PARTIAL, storage_error, write_safetensors
from roundwise.errors import OutputError, RunError


def read_journal(out: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The fingerprint of a run in a folder (None: fresh folder) and its finished blocks.

    Raises:
        OutputError: it is damaged.
    """
    path = out / WORK / "journal.jsonl"
    if not path.exists():
        return None, []
    whole, _, _torn = path.read_bytes().rpartition(b"\n")
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            return None, []
        fingerprint, lists = lines[0]["fingerprint"], lines[1:]
        wrong = validation_error(Fingerprint, fingerprint) or validation_error(
            list[list[BlockRecord]], lists
        )
        if wrong:
            raise ValueError(wrong)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(f"{path} is damaged: start anew with --restart ({error})") from None
    return fingerprint, [block for blocks in lists for block in blocks]


class Journal:
    """The journal of one output folder.

    Args:
        out: output folder; made if it is not there.

    Raises:
        OutputError: another process works in it.
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
            # The kernel lets go of it when the process ends, however it ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            if isinstance(error, BlockingIOError):
                raise OutputError(f"another roundwise process is working in {out}") from None
            # A file system without locks, or none left: to work unlocked could mix two runs.
            raise OutputError(f"cannot lock {self.folder / 'lock'}: {error.strerror}") from None

    def read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """As `read_journal`."""
        return read_journal(self.folder.parent)

    def layers(self) -> list[dict[str, Any]]:
        """Records of all layers of finished blocks."""
        return [layer for block in self.read()[1] for layer in block["layers"]]

    def start(self, fingerprint: dict[str, Any]) -> None:
        """Begins an empty journal."""
        self.path.unlink(missing_ok=True)
        self._append({"fingerprint": fingerprint})

    def trim(self) -> None:
        """Drops a torn last line and files that were being written, so that work can go on."""
        whole, newline, torn = self.path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(self.path, len(whole + newline))
        for path in [*self.folder.glob("*" + PARTIAL), *self.folder.parent.glob("*" + PARTIAL)]:
            path.unlink()

    def blocks_done(self, blocks: list[dict[str, Any]], *, keep: set[str]) -> None:
        """Records finished blocks; of all activations only the files `keep` are still needed."""
        self._append(blocks)
        for path in self.folder.glob("activations-*.safetensors"):
            if path.name not in keep:
                path.unlink()

    def _append(self, line: dict[str, Any] | list[dict[str, Any]]) -> None:
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(error, self.path) from error

    def check_outputs(self) -> None:
        """Reads the activations to go on from once more.

        Raises:
            RunError: they are not what was written.
        """
        done = self.read()[1]
        saved = done[-1]["activations"] if done else None
        for name, digest in (saved["files"] if saved else {}).items():
            file = self.folder / name
            if not file.is_file() or file_digest(file) != digest:
                raise RunError(f"{file} was changed or removed since it was written: use --restart")

    def finish(self) -> None:
        """Removes the work folder: the checkpoint beside it is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def close(self) -> None:
        """Lets go of the lock; what was begun stays for the next run."""
        if not self.path.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


class _OneByOne(dict[str, torch.Tensor]):
    """Tensors of players, each present only while its turn to be written comes."""

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
) -> dict[str, Any]:
    """Writes what block `index` returned to each player of a rank; what `load_outputs` needs to know.

    Args:
        out: output folder of the run.
        index: of the block.
        rank: whose players they are; each writes a file of its own.
        outputs: by player.
        present: see `ForwardScheduler.onloaded`.

    Raises:
        RunError: the block returned something else than a tensor or a tuple of tensors.
    """
    tensors = _OneByOne()
    tensors.onloaded = onloaded
    places = None
    for player, output in outputs.items():
        places = len(output) if isinstance(output, tuple) else None
        values = output if isinstance(output, tuple) else (output,)
        for place, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                tensors[f"{player}.{place}"] = value
            elif value is not None:
                raise RunError(f"block {index} returns a {type(value).__name__}, not a tensor")
    name = f"activations-{index:05d}-{rank}.safetensors"
    digest = write_safetensors(out / WORK / name, tensors)
    return {"files": {name: digest}, "places": places}


def load_outputs(out: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """What all ranks have saved, by player; tensors are memory-mapped."""
    infos: dict[str, Any] = {}
    for name in saved["files"]:
        infos |= read_header(out / WORK / name)
    players = dict.fromkeys(name.rpartition(".")[0] for name in infos)
    if saved["places"] is None:
        return {player: infos[f"{player}.0"].read() for player in players}
    return {
        player: tuple(
            infos[name].read() if (name := f"{player}.{place}") in infos else None
            for place in range(saved["places"])
        )
        for player in players
    }
