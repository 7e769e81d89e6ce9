"""The run from checkpoint to checkpoint, one block at a time.

For each block: read its weights; let all calibration batches play it, solving each group of linears
where they stop; write the shard; record it in the journal; drop the weights. What is finished stays
finished: the same command goes on at the first block that is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roundwise.calibration.dataset import Calibration
from roundwise.checkpoint.manifest import WORK
from roundwise.checkpoint.writer import write_safetensors
from roundwise.config import Mode, QuantizeConfig
from roundwise.errors import FallbackError, OutputError, RunError
from roundwise.forward.batch import depth_error
from roundwise.forward.expert_tokens import ExpertCalibration
from roundwise.forward.offload import CpuOffload, DiskOffload, choose_offload
from roundwise.forward.output_gradients import OutputGradients
from roundwise.forward.scheduler import ForwardScheduler
from roundwise.model.streamed import StreamedModel
from roundwise.plan.memory import MemoryPlan, check_disk_space, plan_disk, plan_memory
from roundwise.run import environment
from roundwise.run.block_solver import BlockSolver, shard_tensors
from roundwise.run.environment import describe_difference, torch_threads
from roundwise.run.finalize import finalize, shard_name, timings
from roundwise.run.held_out_damping import held_out_batches
from roundwise.run.journal import Journal
from roundwise.run.learning_curve import learning_curve_for
from roundwise.run.prescale import Prescaler
from roundwise.run.resume import Checkpointer, check_finished
from roundwise.system.distributed import Ranks
from roundwise.system.memory import keep_freed_memory, trim_heap
from roundwise.system.timer import timer


@dataclass(frozen=True)
class Progress:
    """One step forward, for whoever shows it."""

    block: int
    blocks: int
    resumed: int
    """Blocks that an earlier run had finished."""
    layer: dict[str, Any] | None
    """The layer just solved, as in the result; None: the whole block is written."""


@dataclass
class Run:
    """One run; the methods follow it in time."""

    streamed: StreamedModel
    out: Path
    config: QuantizeConfig
    texts: Calibration | None
    mode: Mode | None
    """None: as an earlier run in this folder chose, else as memory allows."""
    budget: int | None
    """Bytes, for that choice."""
    progress: Callable[[Progress], None] | None
    given: dict[str, str | None]
    """Where the model and the text are, as they were given: for the manifest."""
    ranks: Ranks = field(default_factory=Ranks)
    begun: float = field(default_factory=time.monotonic)
    """time.monotonic() when preparing began."""
    prescaler: Prescaler | None = None
    memory: MemoryPlan | None = None
    """What the run is expected to hold; set with the fingerprint."""
    strict: bool = False
    """What does not go as asked is an error."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """`warnings` and `not_as_asked`, for the record."""
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds by kind of work, of this process."""

    @property
    def output_gradients(self) -> OutputGradients:
        """What was measured of the layers' outputs."""
        return OutputGradients(self.out)

    def forecast(self, mode: Mode | None) -> MemoryPlan:
        """What the run would hold in a mode; None: in the one that memory allows."""
        return plan_memory(
            self.streamed, self.config,
            tokens=-(-self.texts.tokens // self.ranks.count) if self.texts else 0,
            batch=max(b.input_ids.numel() for b in self.texts.batches) if self.texts else 0,
            mode=mode, budget=self.budget, sharing=self.ranks.processes_sharing(self.streamed.device),
        )  # fmt: skip

    def fingerprint(self, known: dict[str, Any] | None) -> dict[str, Any]:
        """Everything that decides the bytes of the result.

        What was not asked for but found on the machine is taken over from a `known` run: the mode that
        its memory allowed, and the number of threads, which decides the order of summation.
        """
        config = self.config.model_dump(mode="json")
        # The first pattern that matches wins: their order counts, which a JSON object's does not.
        config["dynamic"] = [list(item) for item in config["dynamic"].items()]
        known = known or {}
        self.mode = self.mode or known.get("mode")
        self.memory = self.forecast(self.mode)
        if self.texts is not None:
            self.mode = self.memory.mode
        return {
            "config": config,
            "model": self.streamed.checkpoint.identity(),
            "calibration": self.texts.describe() if self.texts else None,
            "mode": self.mode or "none",
            **environment.numeric_environment(self.streamed.device),
            **{key: known[key] for key in ("threads",) if key in known},
        }

    def work(self, journal: Journal | None) -> dict[str, Any]:
        """All blocks that are not finished, then the rest of the checkpoint; all ranks take part.

        Args:
            journal: the first rank's; None on all others.
        """
        timer.device = self.streamed.device
        timer.add("start", time.monotonic() - self.begun - sum(timer.seconds.values()))
        fingerprint, done = self.ranks.broadcast_object(lambda: self._begin(journal))
        if journal is None:
            self._follow(fingerprint)
        if len(done) < len(self.streamed.blocks):
            assert self.memory is not None  # the fingerprint needed it
            with torch_threads(fingerprint["threads"]), keep_freed_memory(self.memory.reuses_freed):
                self._blocks(
                    Checkpointer(self.out, self.streamed.blocks, done, journal, self.ranks)
                )
        with timer.phase("finish"):
            return self.ranks.broadcast_object(
                lambda: finalize(
                    self.streamed, self.out, self.config, fingerprint, self.given, done,
                    lambda: {**timings(done, self.lap()), **self.notes},
                )
            )  # fmt: skip

    def _begin(self, journal: Journal | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The first rank: fingerprint and finished blocks, if they are still what they were."""
        assert journal is not None
        known, done = journal.read()
        fingerprint = self.fingerprint(known)
        if known is None:
            assert self.memory is not None  # the fingerprint needed it
            tokens = self.texts.tokens if self.texts else 0
            check_disk_space(
                self.out, plan_disk(self.streamed, self.config, self.memory, tokens=tokens)
            )
            self.output_gradients.forget()
            journal.start(fingerprint)
        elif known != fingerprint:
            raise OutputError(
                f"{self.out} holds an unfinished run that differs in {describe_difference(known, fingerprint)}: "
                "use the same settings to go on, or --restart to begin anew"
            )
        journal.trim()
        check_finished(self.out, self.streamed.blocks, done, played=self.texts is not None)
        journal.check_outputs()
        return fingerprint, done

    def _follow(self, fingerprint: dict[str, Any]) -> None:
        """Every other rank: works as the first has decided, into the same folder."""
        if not (self.out / WORK / "journal.jsonl").exists():
            raise RunError(
                f"rank {self.ranks.rank} does not see {self.out}: it must be on a file system that all "
                "machines of the run share"
            )
        self.mode = None if fingerprint["mode"] == "none" else fingerprint["mode"]
        self.memory = self.forecast(self.mode)

    def lap(self) -> dict[str, float]:
        """Seconds by kind of work since the last call."""
        taken = timer.take()
        for phase, seconds in taken.items():
            self.spent[phase] = self.spent.get(phase, 0.0) + seconds
        return taken

    def _blocks(self, checkpointer: Checkpointer) -> None:
        first = len(checkpointer.done)
        if self.texts is None:
            for index in range(first, len(self.streamed.blocks)):
                self._block(index, checkpointer, first, None)
            return
        self.streamed.load_outside_blocks()
        self._measure_gradients(first)
        trim_heap()
        with ForwardScheduler(
            self.streamed.model,
            self.streamed.blocks,
            self.texts.batches,
            reference=self.config.needs_reference,
            ratio=self.config.alpha / self.config.beta if self.config.beta else None,
            skip=first,
            outputs=checkpointer.outputs(),
            held_out=held_out_batches(self.config, len(self.texts.batches)),
            policy=ExpertCalibration(self.config.experts, self.config.expert_tokens),
            ranks=self.ranks,
            device=self.streamed.device,
            offload=self._offload(),
        ) as scheduler:
            for index in range(first, len(self.streamed.blocks)):
                scheduler.advance_to_block()
                if index == first:
                    self.streamed.release_pages()
                self._block(index, checkpointer, first, scheduler)

    def _offload(self) -> CpuOffload | DiskOffload | None:
        if self.memory is None or not self.memory.offloaded:
            return None
        return choose_offload(self.streamed, self.out / WORK, tight=not self.memory.keeps_freed)

    def _measure_gradients(self, first: int) -> None:
        """What the solver weighs outputs by, where the settings ask for it."""
        if not self.config.needs_gradients or self.texts is None:
            return
        texts, tokens = self.texts, self.config.output_tokens
        failed = self.ranks.broadcast_object(
            lambda: self.output_gradients.measure(
                self.streamed, texts.batches, tokens=tokens, first=first
            )
        )
        if failed:
            line = f"all outputs of a layer count alike: the model gives no gradients, {failed}"
            if self.strict:
                raise FallbackError(
                    f"not as asked, and --strict was given: {line}; --output-tokens 0 asks for it"
                )
            self.notes.setdefault("not_as_asked", []).append(line)

    def _block(
        self,
        index: int,
        checkpointer: Checkpointer,
        first: int,
        scheduler: ForwardScheduler | None,
    ) -> None:
        """One block from weights on disk to shard on disk."""
        block = self.streamed.blocks[index]
        solver = BlockSolver(
            block, self.config, prescaler=self.prescaler, ranks=self.ranks,
            release=self.streamed.release_pages,
            tell=lambda layer: self._tell(index, first, layer),
            outputs=self.output_gradients.weights_of_block(index),
        )  # fmt: skip
        with timer.phase("read"):
            self.streamed.load(block.module, block.prefix)
            self.streamed.prefetch(index + 1)
        played: dict[str, Any] = {
            "activations": None, "experts": {}, "depth_error": None, "saturation": None
        }  # fmt: skip
        if scheduler is not None:
            played |= self._play(index, checkpointer, scheduler, solver)
        solver.quantize_remaining()
        shard, digest = shard_name(index, len(self.streamed.blocks)), ""
        if checkpointer.journal is not None:
            with timer.phase("write"):
                tensors = shard_tensors(self.streamed, index, solver.packed, solver.folded)
                digest = write_safetensors(self.out / shard, tensors)
        self.streamed.unload(block.module, block.prefix)
        finished = {
            "block": index, "name": block.name, "shard": shard, "sha256": digest,
            "layers": solver.layers, **played, "seconds": self.lap(),
        }  # fmt: skip
        checkpointer.finished(finished, played=scheduler is not None)
        self._tell(index, first, None)

    def _play(
        self,
        index: int,
        checkpointer: Checkpointer,
        scheduler: ForwardScheduler,
        solver: BlockSolver,
    ) -> dict[str, Any]:
        """Plays a block with all batches; what the journal keeps of it."""
        block = self.streamed.blocks[index]
        groups = scheduler.discover_groups(block)
        watch = None
        if (
            groups and self.texts and self.ranks.is_single
        ):  # a rank's part of the text says too little
            total = len(self.texts.batches)
            batches = total - len(held_out_batches(self.config, total))
            name = groups[0].names[0]
            watch = learning_curve_for(self.streamed.blocks, index, name, self.config, batches)
            groups[0].watch = watch
        sequential = self.mode == "true_sequential"
        routed = scheduler.run_block(block, groups, solver.solve, sequential=sequential)
        activations, error = None, None
        if not block.is_head:
            with timer.phase("watch"):
                error = depth_error(scheduler.quantized, self.ranks, scheduler.onloaded)
            activations = checkpointer.save(index, scheduler)
        return {
            "activations": activations, "experts": routed, "depth_error": error,
            "saturation": watch.record() if watch else None,
        }  # fmt: skip

    def _tell(self, index: int, first: int, layer: dict[str, Any] | None) -> None:
        if self.progress is not None and self.ranks.first:
            self.progress(Progress(index, len(self.streamed.blocks), first, layer))
