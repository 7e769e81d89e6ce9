"""Run: quantizes a model block by block, as a `RunPlan` says.

For each block: read its weights; run it with all calibration batches, and solve each group of linears
where the batches stop; write its tensors to a file; record it in the journal; drop the weights. Finished
blocks are kept: the same command resumes at the first block that is not finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from roundwise.calibration.held_out import held_out_batches
from roundwise.checkpoint.manifest import (
    BlockRecord,
    LayerRecord,
    Manifest,
    SavedActivations,
)
from roundwise.checkpoint.side_files import WORK
from roundwise.checkpoint.writer import write_safetensors
from roundwise.errors import FallbackError
from roundwise.forward.batch import depth_error
from roundwise.forward.expert_tokens import ExpertCalibration
from roundwise.forward.offload import CpuOffload, DiskOffload, choose_offload
from roundwise.forward.output_gradients import OutputGradients
from roundwise.forward.scheduler import ForwardScheduler
from roundwise.model.blocks import set_weight, weight_of
from roundwise.run.block_solver import BlockSolver
from roundwise.run.environment import torch_threads
from roundwise.run.finalize import finalize, packed_block, read_block
from roundwise.run.journal import Journal, block_file
from roundwise.run.prepare import RunPlan
from roundwise.run.resume import Checkpointer, broadcast_record
from roundwise.system.activity import announce, logger
from roundwise.system.memory import keep_freed_memory, trim_heap
from roundwise.system.timer import timer


@dataclass(frozen=True)
class Progress:
    """One step of a run."""

    block: int
    blocks: int
    resumed: int
    """Blocks that an earlier run had finished."""
    layer: LayerRecord | None
    """The layer that was just solved; None: the whole block is written."""
    seconds_left: float | None = None
    """Estimate for the rest of the run; None: no block is finished yet."""


@dataclass(frozen=True)
class _BlockResult:
    """Findings of running a block with the calibration batches, for its record."""

    activations: SavedActivations | None = None
    experts: dict[str, list[int]] | None = None
    depth_error: float | None = None


class Run:
    """One run; its methods follow it in time.

    Args:
        plan: the plan to carry out. For a resumed run it has the earlier run's mode and number of
            threads (`RunPlan.resuming`).
        out: output folder.
        progress: called after each layer and each block, on the first rank.
        strict: gradients that cannot be computed are an error instead of an issue.
    """

    def __init__(
        self,
        plan: RunPlan,
        out: Path,
        progress: Callable[[Progress], None] | None = None,
        *,
        strict: bool = False,
    ) -> None:
        self.plan, self.out, self.progress, self.strict = plan, out, progress, strict
        self.streamed, self.config, self.ranks = plan.streamed, plan.config, plan.ranks
        self.gradients = OutputGradients(out)
        self.issues = list(plan.issues)
        """Issues so far: requests that could not be honoured."""
        self.seconds: dict[str, float] = {}
        """Phase -> seconds, of this process."""
        self._pace = _Pace()

    def execute(self, done: list[BlockRecord], journal: Journal | None) -> Manifest:
        """Quantizes all blocks that are not finished, then writes the rest of the checkpoint.

        All ranks take part.

        Args:
            done: blocks that earlier runs have finished; grows.
            journal: the first rank's; None on all others.
        """
        timer.device = self.streamed.device
        timer.add("start", time.monotonic() - self.plan.begun - sum(timer.seconds.values()))
        if len(done) < len(self.streamed.blocks):
            keep = self.plan.memory.reuses_freed
            with torch_threads(self.plan.threads), keep_freed_memory(keep):
                checkpointer = Checkpointer(
                    self.out, self.streamed.blocks, done, journal, self.ranks
                )
                self._quantize_blocks(checkpointer)
        announce("completing the checkpoint")
        with timer.phase("finish"):
            manifest = broadcast_record(self.ranks, Manifest, lambda: self._finalize(done, journal))
        assert manifest is not None
        return manifest

    def _finalize(self, done: list[BlockRecord], journal: Journal | None) -> Manifest:
        assert journal is not None  # the first rank
        return finalize(
            self.plan, self.out, done, journal, issues=self.issues, lap=self.take_seconds
        )

    def take_seconds(self) -> dict[str, float]:
        """Phase -> seconds since the last call; adds them to `seconds`."""
        taken = timer.take()
        for phase, seconds in taken.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        return taken

    def _quantize_blocks(self, checkpointer: Checkpointer) -> None:
        first, blocks = len(checkpointer.done), len(self.streamed.blocks)
        if self.plan.calibration is None:
            for index in range(first, blocks):
                self._quantize_block(index, first, checkpointer, None)
            return
        self.streamed.load_outside_blocks()
        self._measure_gradients(first)
        trim_heap()
        towers = sum(block.is_tower for block in self.streamed.blocks)
        with self._scheduler(first, checkpointer) as scheduler:
            for index in scheduler.order:
                scheduler.advance_to_block()
                if index == max(first, towers):  # embeddings and projectors have been called
                    self.streamed.release_pages()
                if index < first:
                    self._replay_block(index, checkpointer.done[index], scheduler)
                else:
                    self._quantize_block(index, first, checkpointer, scheduler)

    def _scheduler(self, first: int, checkpointer: Checkpointer) -> ForwardScheduler:
        """Returns the scheduler that runs the calibration batches, from block `first` on."""
        config, calibration = self.config, self.plan.calibration
        assert calibration is not None
        return ForwardScheduler(
            self.streamed.model,
            self.streamed.blocks,
            calibration.batches,
            reference=config.needs_reference,
            ratio=config.alpha / config.beta if config.beta else None,
            skip=first,
            outputs=checkpointer.outputs(),
            held_out=held_out_batches(config, len(calibration.batches)),
            policy=ExpertCalibration(config.experts, config.expert_tokens),
            ranks=self.ranks,
            device=self.streamed.device,
            offload=self._offload(),
        )

    def _offload(self) -> CpuOffload | DiskOffload | None:
        memory = self.plan.memory
        if not memory.offloaded:
            return None
        return choose_offload(self.streamed, self.out / WORK, tight=not memory.keeps_freed)

    def _measure_gradients(self, first: int) -> None:
        """Computes the gradients of layer outputs, if the settings need them."""
        calibration, tokens = self.plan.calibration, self.config.output_tokens
        if not self.config.needs_gradients or calibration is None:
            return
        reason = self.ranks.broadcast_object(
            lambda: self.gradients.measure(
                self.streamed, calibration.batches, tokens=tokens, first=first
            )
        )
        if reason:
            line = f"all outputs of a layer count alike: the model gives no gradients, {reason}"
            if self.strict:
                raise FallbackError(
                    f"not as asked, and --strict was given: {line}; --output-tokens 0 asks for it"
                )
            self.issues.append(line)

    def _quantize_block(
        self, index: int, first: int, checkpointer: Checkpointer, scheduler: ForwardScheduler | None
    ) -> None:
        """One block, from weights on disk to its finished file."""
        block = self.streamed.blocks[index]
        announce("quantizing blocks", index, len(self.streamed.blocks))
        self._pace.begin()
        solver = BlockSolver(
            block, self.config, ranks=self.ranks,
            maps=self.streamed.maps, gradients=self.gradients.of_block(index),
            on_layer=lambda layer: self._report(index, first, layer),
            device=self.streamed.device,
        )  # fmt: skip
        with timer.phase("read"):
            self.streamed.load(block.module, block.prefix)
            self.streamed.prefetch(index + 1)
        ran = _BlockResult()
        if scheduler is not None:
            ran = self._run_block(index, checkpointer, scheduler, solver)
        solver.quantize_remaining()
        digest, nbytes = "", 0
        if checkpointer.journal is not None:
            with timer.phase("write"):
                tensors = packed_block(self.streamed, index, solver.packed)
                digest = write_safetensors(self.out / WORK / block_file(index), tensors)
                nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self.streamed.unload(block.module, block.prefix)
        record = BlockRecord(
            block=index, name=block.name, sha256=digest, nbytes=nbytes, layers=solver.layers,
            activations=ran.activations, experts=ran.experts or {}, depth_error=ran.depth_error,
            seconds=self.take_seconds(),
        )  # fmt: skip
        needs_activations = scheduler is not None and not block.is_tower
        checkpointer.block_finished(record, needs_activations=needs_activations)
        self._pace.end()
        self._report(index, first, None)

    def _replay_block(self, index: int, record: BlockRecord, scheduler: ForwardScheduler) -> None:
        """Runs a block of a tower again that an earlier run has finished."""
        block = self.streamed.blocks[index]

        def use_quantized() -> None:
            weights = read_block(self.plan, self.out, record)
            for name, q in weights.items():
                W = weight_of(block.linears[name])
                set_weight(block.linears[name], q.dequantize(W.dtype).to(W.device))

        announce("running finished blocks of towers again", index, len(self.streamed.blocks))
        self.streamed.load(block.module, block.prefix)
        scheduler.replay_block(use_quantized)
        self.streamed.unload(block.module, block.prefix)

    def _run_block(
        self,
        index: int,
        checkpointer: Checkpointer,
        scheduler: ForwardScheduler,
        solver: BlockSolver,
    ) -> _BlockResult:
        """Runs a block with all batches and solves its groups."""
        block = self.streamed.blocks[index]
        groups = scheduler.discover_groups(block)
        sequential = self.plan.mode == "true_sequential"
        experts = scheduler.run_block(block, groups, solver.solve, sequential=sequential)
        activations, error = None, None
        if not block.is_head:
            with timer.phase("watch"):
                error = depth_error(scheduler.quantized, self.ranks, scheduler.onloaded)
            activations = checkpointer.save(index, scheduler)
        return _BlockResult(activations, experts, error)

    def _report(self, index: int, first: int, layer: LayerRecord | None) -> None:
        blocks = len(self.streamed.blocks)
        left = self._pace.seconds_left(blocks - index - (layer is None))
        if layer is not None and layer.relative_error is not None:
            logger.info("%s: relative error %.3g", layer.name, layer.relative_error)
        elif layer is None and left is not None:
            logger.info("block %d/%d finished, about %.0f s left", index + 1, blocks, left)
        if self.progress is not None and self.ranks.is_first:
            self.progress(Progress(index, blocks, first, layer, left))


class _Pace:
    """Time that blocks take; the first one also warms up, so it counts only while it is alone."""

    def __init__(self) -> None:
        self._begun, self._durations = 0.0, list[float]()

    def begin(self) -> None:
        """Notes that a block begins."""
        self._begun = time.monotonic()

    def end(self) -> None:
        """Notes that the block is finished."""
        self._durations.append(time.monotonic() - self._begun)
        self._begun = 0.0

    def seconds_left(self, blocks: int) -> float | None:
        """Estimates the time for so many blocks, the unfinished one among them; None: not known."""
        known = self._durations[1:] or self._durations
        if not known:
            return None
        spent = time.monotonic() - self._begun if self._begun else 0.0
        return max(0.0, blocks * sum(known) / len(known) - spent)
