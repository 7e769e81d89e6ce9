"""Resuming: locks the output folder, checks its finished blocks, and saves what the next run needs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from roundwise.checkpoint.manifest import (
    MANIFEST,
    BlockRecord,
    Fingerprint,
    Manifest,
    Record,
    SavedActivations,
    read_manifest,
)
from roundwise.checkpoint.side_files import WORK, changed_files
from roundwise.checkpoint.writer import storage_error
from roundwise.errors import OutputError, RunError
from roundwise.forward.output_gradients import OutputGradients
from roundwise.forward.scheduler import ForwardScheduler
from roundwise.model.blocks import Block
from roundwise.plan.memory import check_disk_space, plan_disk
from roundwise.run.environment import describe_difference
from roundwise.run.finalize import plan_shards
from roundwise.run.journal import (
    Journal,
    JournalContents,
    block_file,
    check_file,
    load_outputs,
    save_outputs,
)
from roundwise.run.prepare import RunPlan
from roundwise.system.device import HOST
from roundwise.system.distributed import Ranks
from roundwise.system.timer import timer

R = TypeVar("R", bound=Record)

#: Save activations again only after PACE × the duration of the last save: at most 5% of the run is spent
#: writing.
PACE = 19


def broadcast_record(ranks: Ranks, kind: type[R], make: Callable[[], R | None]) -> R | None:
    """The record that the first rank makes, or its None, on all ranks.

    Args:
        ranks: the processes of the run.
        kind: class of the record.
        make: called on the first rank only.
    """
    if ranks.is_single:
        return make()

    def as_json() -> dict[str, Any] | None:
        record = make()
        return None if record is None else record.as_json()

    value = ranks.broadcast_object(as_json)
    return None if value is None else kind.model_validate(value)


def lock_output_dir(out: Path, source: Path, *, restart: bool) -> Journal:
    """Locks the output folder, and empties it if it holds nothing to resume.

    Args:
        out: the folder; made if it is not there.
        source: the model's folder.
        restart: empty it whatever it holds of ours.

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
    # No journal and no config.json: the folder is new, or an earlier --restart was interrupted.
    if restart or not (journal.path.exists() or (out / "config.json").exists()):
        try:
            _empty(out, journal)
        except OSError as error:
            journal.close()
            raise storage_error(error, Path(error.filename or out)) from error
    return journal


def _empty(out: Path, journal: Journal) -> None:
    # config.json and the journal go first, so that a half-emptied folder looks neither finished nor
    # begun. The manifest goes last, so that the folder is still recognised as roundwise's.
    for path in (out / "config.json", journal.path):
        path.unlink(missing_ok=True)
    for path in [*out.iterdir(), *journal.folder.iterdir()]:
        if path.name not in (WORK, "lock", MANIFEST):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (out / MANIFEST).unlink(missing_ok=True)


def finished_manifest(out: Path, plan: RunPlan) -> Manifest | None:
    """The manifest in the output folder, if this very run was completed there before; else None.

    Raises:
        OutputError: it holds a checkpoint made with other settings, or changed since.
        CheckpointError: its manifest is damaged.
    """
    if not (out / "config.json").exists():
        return None
    manifest = read_manifest(out)
    made = manifest.run.as_json() if manifest else {}
    wanted = plan.resuming(manifest.run if manifest else None).fingerprint.as_json()
    if manifest is None or made != wanted:
        raise OutputError(
            f"{out} holds a finished checkpoint made with other settings "
            f"({describe_difference(made, wanted)}): give another folder, or --restart to replace it"
        )
    changed = changed_files(out, manifest.files)
    if changed.evidence:
        raise OutputError(
            f"{out} holds a finished checkpoint that was changed since: {changed.evidence[0]}; "
            "--restart makes it again"
        )
    return manifest


def begin_run(
    plan: RunPlan, out: Path, journal: Journal | None
) -> tuple[RunPlan, list[BlockRecord]]:
    """Starts or resumes a run; all ranks get the first rank's plan and finished blocks.

    Args:
        plan: from `prepare`.
        out: output folder.
        journal: the first rank's; None on all others.

    Raises:
        OutputError: the folder holds an unfinished run with other settings, or has too little room.
        RunError: a finished block is not what was written, or a rank does not see the folder.
    """
    ready: list[RunPlan] = []

    def begin() -> list[Any]:
        assert journal is not None
        resumed, blocks = _begin(plan, out, journal)
        ready.append(resumed)
        return [resumed.fingerprint.as_json(), [block.as_json() for block in blocks]]

    if plan.ranks.is_single:
        assert journal is not None
        return _begin(plan, out, journal)
    fingerprint, lines = plan.ranks.broadcast_object(begin)
    blocks = [BlockRecord.model_validate(line) for line in lines]
    if ready:
        return ready[0], blocks
    if not (out / WORK / "journal.jsonl").exists():
        raise RunError(
            f"rank {plan.ranks.rank} does not see {out}: it must be on a file system that all "
            "machines of the run share"
        )
    return plan.resuming(Fingerprint.model_validate(fingerprint)), blocks


def _begin(plan: RunPlan, out: Path, journal: Journal) -> tuple[RunPlan, list[BlockRecord]]:
    """The first rank: the plan to follow and the finished blocks, if they are still what they were."""
    found = journal.read()
    known, done = found.fingerprint, [*found.blocks]
    plan = plan.resuming(known)
    if known is None:
        tokens = plan.calibration.record.tokens if plan.calibration else 0
        disk = plan_disk(plan.streamed, plan.config, plan.memory, tokens=tokens)
        check_disk_space(out, disk)
        OutputGradients(out).clear()
        journal.start(plan.fingerprint, plan.given, len(plan.streamed.blocks))
    elif known.as_json() != plan.fingerprint.as_json():
        differs = describe_difference(known.as_json(), plan.fingerprint.as_json())
        raise OutputError(
            f"{out} holds an unfinished run that differs in {differs}: use the same settings to resume "
            "it, or --restart to begin anew"
        )
    journal.trim()
    _check_finished(out, plan, found)
    journal.check_outputs()
    return plan, done


def _check_finished(out: Path, plan: RunPlan, found: JournalContents) -> None:
    """Checks that finished blocks and shards are this model's, and their files what was written.

    Args:
        out: output folder.
        plan: of the run.
        found: its journal.

    Raises:
        OutputError: the journal is damaged.
        RunError: a file is not what was written.
    """
    blocks, done, shards = plan.streamed.blocks, found.blocks, [r.shard for r in found.shards]
    known = [
        (record.block, record.name) == (index, block.name)
        and all(layer.name in block.linears for layer in record.layers)
        for index, (block, record) in enumerate(zip(blocks, done, strict=False))
    ]
    # Batches run through the blocks: the outputs of the last finished block must have been saved, unless
    # it is run again.
    unfinished = 0 < len(done) < len(blocks) and not blocks[len(done) - 1].is_tower
    lost = plan.calibration is not None and unfinished and done[-1].activations is None
    planned = plan_shards(plan.streamed, [*done]) if len(done) == len(blocks) else []
    if len(done) > len(blocks) or not all(known) or lost or shards != planned[: len(shards)]:
        raise OutputError(f"the journal in {out / WORK} is damaged: start anew with --restart")
    for record in found.shards:
        check_file(out / record.shard.name, record.sha256)
    for block in done[sum(len(shard.blocks) for shard in shards) :]:
        check_file(out / WORK / block_file(block.block), block.sha256)


class WritePace:
    """Limits the part of the time that goes into writing; see `PACE`."""

    def __init__(self) -> None:
        self._last, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Returns True when it is time to write again; the first time always."""
        return time.monotonic() - self._last >= PACE * self._cost

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Context manager around the writing: measures how long it takes."""
        begun = time.monotonic()
        yield
        self._last = time.monotonic()
        self._cost = self._last - begun


class Checkpointer:
    """Saves the outputs that a stopped run resumes with, and records blocks once that is possible.

    Args:
        out: output folder.
        blocks: all blocks of the model.
        done: finished blocks in order; grows.
        journal: the first rank's; None on all others.
        ranks: the processes of the run.
    """

    def __init__(
        self,
        out: Path,
        blocks: list[Block],
        done: list[BlockRecord],
        journal: Journal | None,
        ranks: Ranks,
    ) -> None:
        self.out, self.blocks, self.done = out, blocks, done
        self.journal, self.ranks, self.pace = journal, ranks, WritePace()
        self._unrecorded: list[BlockRecord] = []

    def outputs(self) -> dict[int, dict[str, Any]]:
        """`Block.stack` -> batch -> what the last finished block of the stack returned."""
        return {stack: load_outputs(self.out, saved) for stack, saved in self._needed().items()}

    def save(self, index: int, scheduler: ForwardScheduler) -> SavedActivations | None:
        """Writes what block `index` returned to all batches; None: nobody needs it, or it is too early.

        On the CPU, and if batches are offloaded, they continue with the outputs in the file, which are
        memory-mapped and need no memory of their own. On an accelerator, writing every block would
        take longer than computing it: there outputs are saved at a `WritePace`, and at the end of each
        stack of blocks, whose outputs all blocks of the next stack need. Blocks of towers are run again
        instead: a model may use what any of them returned.
        """
        if index == len(self.blocks) - 1 or self.blocks[index].is_tower:
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
        if saved is None:
            return None
        if from_file:
            scheduler.replace_outputs(load_outputs(self.out, saved))
        files = [
            item for each in self.ranks.all_gather_object(saved.files) for item in each.items()
        ]
        return SavedActivations(files=dict(files), places=saved.places)

    def block_finished(self, record: BlockRecord, *, needs_activations: bool) -> None:
        """Records a block in the journal, with those before it, once a run can resume behind it.

        Args:
            record: the finished block.
            needs_activations: batches run through the blocks: a run can only resume after a block
                whose outputs were saved.
        """
        self.done.append(record)
        self._unrecorded.append(record)
        if needs_activations and not record.activations and len(self.done) < len(self.blocks):
            return
        if self.journal is not None:
            unfinished = len(self.done) < len(self.blocks)
            needed = self._needed().values() if unfinished else []
            names = {name for saved in needed for name in saved.files}
            self.journal.blocks_done(self._unrecorded, keep=names)
            for each in self._unrecorded:
                OutputGradients(self.out).clear(each.block)
        self._unrecorded = []

    def _needed(self) -> dict[int, SavedActivations]:
        """`Block.stack` -> activations last saved of it: all that is needed to resume."""
        blocks = zip(self.blocks, self.done, strict=False)
        return {block.stack: r.activations for block, r in blocks if r.activations is not None}
