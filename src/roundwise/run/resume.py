"""The output folder before a run works in it: locked, refused if it is another's, emptied on request.

What a stopped run goes on from: when it is written, and when a finished block counts.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from roundwise.checkpoint.manifest import WORK
from roundwise.checkpoint.untrusted import file_digest
from roundwise.checkpoint.writer import storage_error
from roundwise.errors import OutputError, RunError
from roundwise.forward.output_gradients import OutputGradients
from roundwise.forward.scheduler import ForwardScheduler
from roundwise.model.blocks import Block
from roundwise.run.environment import describe_difference
from roundwise.run.journal import Journal, load_outputs, save_outputs
from roundwise.system.device import HOST
from roundwise.system.distributed import Ranks
from roundwise.system.timer import timer
from roundwise.verify import MANIFEST, changed_files, read_manifest


def lock_output_dir(out: Path, source: Path, *, restart: bool) -> Journal:
    """Locks the output folder.

    Args:
        out: the folder; made if it is not there.
        source: the model's folder.
        restart: empty it first.

    Raises:
        OutputError: it is the model, holds something else, or another process works in it.
        StorageError: it cannot be emptied.
    """
    if out.resolve() == source.resolve():
        raise OutputError(f"{out} is the model itself: give another folder")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, not a folder")
    ours = (out / WORK).is_dir() or (out / MANIFEST).is_file()
    if not ours and out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} already holds something else: give an empty or new folder")
    journal = Journal(out)
    # Neither finished nor begun: an earlier --restart did not get to its end.
    if restart or not (journal.path.exists() or (out / "config.json").exists()):
        try:
            _empty(out, journal)
        except OSError as error:
            journal.close()
            raise storage_error(error, Path(error.filename or out)) from error
    return journal


def _empty(out: Path, journal: Journal) -> None:
    # What makes it a model goes first: a folder half emptied must not look finished. What says that it
    # is ours goes last: it must not look like somebody else's either.
    (out / "config.json").unlink(missing_ok=True)
    for path in [*out.iterdir(), *journal.folder.iterdir()]:
        if path.name not in (WORK, "lock", MANIFEST):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (out / MANIFEST).unlink(missing_ok=True)


def finished(
    out: Path, fingerprint: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any] | None:
    """The manifest, if this very run was completed in the output folder before.

    Args:
        out: the folder.
        fingerprint: of the run that is to be made, given that of the one that was.

    Raises:
        OutputError: it holds a checkpoint made otherwise, or one that was changed since.
        CheckpointError: its manifest is damaged.
    """
    if not (out / "config.json").exists():
        return None
    manifest = read_manifest(out)
    made = manifest["run"] if manifest else {}
    wanted = fingerprint(made)
    if manifest is None or made != wanted:
        raise OutputError(
            f"{out} holds a finished checkpoint made otherwise ({describe_difference(made, wanted)}): give "
            "another folder, or --restart to replace it"
        )
    changed = changed_files(out, manifest["files"])
    if changed:
        raise OutputError(
            f"{out} holds a finished checkpoint that was changed since: {changed[0]}; --restart makes "
            "it again"
        )
    return manifest


#: How many times as long as it has taken to write batches down a run works before it does so again.
PACE = 19


class WritePace:
    """At most a twentieth of the time goes into writing."""

    def __init__(self) -> None:
        self._last, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time again; the first time always."""
        return time.monotonic() - self._last >= PACE * self._cost

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around the writing."""
        begun = time.monotonic()
        yield
        self._last = time.monotonic()
        self._cost = self._last - begun


def check_finished(
    out: Path, blocks: list[Block], done: list[dict[str, Any]], *, played: bool
) -> None:
    """What a journal calls finished is of this model, and its shards are what was written.

    Args:
        out: folder of the run.
        blocks: all of the model.
        done: from the journal.
        played: batches go through the blocks, and must have come as far.

    Raises:
        OutputError: the journal is damaged.
        RunError: a shard is not what was written.
    """
    known = [
        (line["block"], line["name"]) == (index, block.name)
        and all(layer["name"] in block.linears for layer in line["layers"])
        for index, (block, line) in enumerate(zip(blocks, done, strict=False))
    ]
    unfinished = bool(done) and len(done) < len(blocks)
    lost = played and unfinished and not done[-1]["activations"]
    if len(done) > len(blocks) or not all(known) or lost:
        raise OutputError(f"the journal in {out / WORK} is damaged: start anew with --restart")
    for line in done:
        shard = out / line["shard"]
        if not shard.exists() or file_digest(shard) != line["sha256"]:
            raise RunError(f"{shard} was changed or removed since it was written: use --restart")


class Checkpointer:
    """Those of one run.

    Args:
        out: its folder.
        blocks: all of the model.
        done: what is known of finished blocks, in their order; grows.
        journal: the first rank's; None on all others.
        ranks: with whom the work is shared.
    """

    def __init__(
        self,
        out: Path,
        blocks: list[Block],
        done: list[dict[str, Any]],
        journal: Journal | None,
        ranks: Ranks,
    ) -> None:
        self.out, self.blocks, self.done = out, blocks, done
        self.journal, self.ranks, self.pace = journal, ranks, WritePace()
        self._unrecorded: list[dict[str, Any]] = []

    def outputs(self) -> dict[int, dict[str, Any]]:
        """What to go on from, by the stack of blocks that returned it."""
        return {stack: load_outputs(self.out, saved) for stack, saved in self._kept().items()}

    def save(self, index: int, scheduler: ForwardScheduler) -> dict[str, Any] | None:
        """Writes what block `index` returned to all batches; None: nobody needs it, or it is too early.

        Batches on the CPU, and those that wait, go on from the file, which takes no memory of theirs. A
        device would take longer to write every block than to compute it: there it is done at a `WritePace`,
        and where another stack begins, as all of its blocks need what the one before returned.
        """
        if index == len(self.blocks) - 1:
            return None
        from_file = scheduler.device == HOST or scheduler.offload is not None
        ends = self.blocks[index].stack != self.blocks[index + 1].stack
        # All ranks or none: where one has no room for its batches, the others write theirs too.
        wanted = ends or any(self.ranks.all_reduce_max(int(from_file)))
        if not (wanted or self.ranks.broadcast_object(self.pace.due)):
            return None
        with timer.phase("write"), self.pace.writing():
            rank, outputs = self.ranks.rank, scheduler.outputs()
            saved = save_outputs(self.out, index, rank, outputs, scheduler.onloaded)
        if from_file:
            scheduler.replace_outputs(load_outputs(self.out, saved))
        files = [
            item for each in self.ranks.all_gather_object(saved) for item in each["files"].items()
        ]
        return {**saved, "files": dict(files)}

    def finished(self, block: dict[str, Any], *, played: bool) -> None:
        """A block is finished; recorded, with those before, once a run can go on behind it.

        Args:
            block: for the journal.
            played: batches went through it; otherwise there is nothing to go on from but its shard.
        """
        self.done.append(block)
        self._unrecorded.append(block)
        if played and not block["activations"] and len(self.done) < len(self.blocks):
            return
        if self.journal is not None:
            names = {name for saved in self._kept().values() for name in saved["files"]}
            self.journal.blocks_done(self._unrecorded, keep=names)
            for each in self._unrecorded:
                OutputGradients(self.out).forget(each["block"])
        self._unrecorded = []

    def _kept(self) -> dict[int, dict[str, Any]]:
        """The activations last written of each stack: all that is needed to go on."""
        blocks = zip(self.blocks, self.done, strict=False)
        return {block.stack: line["activations"] for block, line in blocks if line["activations"]}
