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
from roundwise.config import QuantizeConfig
from roundwise.errors import FallbackError, OutputError, RunError
from roundwise.forward.batch import depth_error
from roundwise.forward.expert_tokens import Policy
from roundwise.forward.offload import Parking, Shelf, parking_for
from roundwise.forward.output_gradients import Curvature
from roundwise.forward.scheduler import Conductor
from roundwise.model.streamed import Skeleton
from roundwise.plan.memory import Memory, check_room, plan_disk, plan_memory
from roundwise.run import environment
from roundwise.run.block_solver import BlockSolver, shard_tensors
from roundwise.run.environment import difference, threads
from roundwise.run.finalize import finish, shard_name, timings
from roundwise.run.held_out_damping import held_out
from roundwise.run.journal import Journal
from roundwise.run.learning_curve import watched
from roundwise.run.prescale import Prescaler
from roundwise.run.resume import Savepoints, check_finished
from roundwise.system.distributed import Ranks
from roundwise.system.memory import Mode, give_back, keeping
from roundwise.system.timer import clock


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

    skeleton: Skeleton
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
    memory: Memory | None = None
    """What the run is expected to hold; set with the fingerprint."""
    strict: bool = False
    """What does not go as asked is an error."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """`warnings` and `not_as_asked`, for the record."""
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds by kind of work, of this process."""

    @property
    def curvature(self) -> Curvature:
        """What was measured of the layers' outputs."""
        return Curvature(self.out)

    def forecast(self, mode: Mode | None) -> Memory:
        """What the run would hold in a mode; None: in the one that memory allows."""
        return plan_memory(
            self.skeleton, self.config,
            tokens=-(-self.texts.tokens // self.ranks.count) if self.texts else 0,
            batch=max(b.input_ids.numel() for b in self.texts.batches) if self.texts else 0,
            mode=mode, budget=self.budget, sharing=self.ranks.sharing(self.skeleton.device),
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
            "model": self.skeleton.checkpoint.identity(),
            "calibration": self.texts.describe() if self.texts else None,
            "mode": self.mode or "none",
            **environment.deciding(self.skeleton.device),
            **{key: known[key] for key in ("threads",) if key in known},
        }

    def work(self, journal: Journal | None) -> dict[str, Any]:
        """All blocks that are not finished, then the rest of the checkpoint; all ranks take part.

        Args:
            journal: the first rank's; None on all others.
        """
        clock.device = self.skeleton.device
        clock.add("start", time.monotonic() - self.begun - sum(clock.seconds.values()))
        fingerprint, done = self.ranks.agree(lambda: self._begin(journal))
        if journal is None:
            self._follow(fingerprint)
        if len(done) < len(self.skeleton.blocks):
            assert self.memory is not None  # the fingerprint needed it
            with threads(fingerprint["threads"]), keeping(self.memory.reuses):
                self._blocks(Savepoints(self.out, self.skeleton.blocks, done, journal, self.ranks))
        with clock.phase("finish"):
            return self.ranks.agree(
                lambda: finish(
                    self.skeleton, self.out, self.config, fingerprint, self.given, done,
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
            check_room(self.out, plan_disk(self.skeleton, self.config, self.memory, tokens=tokens))
            self.curvature.forget()
            journal.start(fingerprint)
        elif known != fingerprint:
            raise OutputError(
                f"{self.out} holds an unfinished run that differs in {difference(known, fingerprint)}: "
                "use the same settings to go on, or --restart to begin anew"
            )
        journal.trim()
        check_finished(self.out, self.skeleton.blocks, done, played=self.texts is not None)
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
        taken = clock.take()
        for phase, seconds in taken.items():
            self.spent[phase] = self.spent.get(phase, 0.0) + seconds
        return taken

    def _blocks(self, savepoints: Savepoints) -> None:
        first = len(savepoints.done)
        if self.texts is None:
            for index in range(first, len(self.skeleton.blocks)):
                self._block(index, savepoints, first, None)
            return
        self.skeleton.load_outside_blocks()
        self._measure_gradients(first)
        give_back()
        with Conductor(
            self.skeleton.model,
            self.skeleton.blocks,
            self.texts.batches,
            reference=self.config.needs_reference,
            ratio=self.config.alpha / self.config.beta if self.config.beta else None,
            skip=first,
            outputs=savepoints.outputs(),
            held_out=held_out(self.config, len(self.texts.batches)),
            policy=Policy(self.config.experts, self.config.expert_tokens),
            ranks=self.ranks,
            device=self.skeleton.device,
            parking=self._parking(),
        ) as conductor:
            for index in range(first, len(self.skeleton.blocks)):
                conductor.enter()
                if index == first:
                    self.skeleton.release_pages()
                self._block(index, savepoints, first, conductor)

    def _parking(self) -> Parking | Shelf | None:
        if self.memory is None or not self.memory.parked:
            return None
        return parking_for(self.skeleton, self.out / WORK, tight=not self.memory.keeps)

    def _measure_gradients(self, first: int) -> None:
        """What the solver weighs outputs by, where the settings ask for it."""
        if not self.config.needs_gradients or self.texts is None:
            return
        texts, tokens = self.texts, self.config.output_tokens
        failed = self.ranks.agree(
            lambda: self.curvature.measure(self.skeleton, texts.batches, tokens=tokens, first=first)
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
        savepoints: Savepoints,
        first: int,
        conductor: Conductor | None,
    ) -> None:
        """One block from weights on disk to shard on disk."""
        block = self.skeleton.blocks[index]
        solver = BlockSolver(
            block, self.config, prescaler=self.prescaler, ranks=self.ranks,
            release=self.skeleton.release_pages,
            tell=lambda layer: self._tell(index, first, layer),
            outputs=self.curvature.of_block(index),
        )  # fmt: skip
        with clock.phase("read"):
            self.skeleton.load(block.module, block.prefix)
            self.skeleton.read_ahead(index + 1)
        played: dict[str, Any] = {
            "activations": None, "experts": {}, "depth_error": None, "saturation": None
        }  # fmt: skip
        if conductor is not None:
            played |= self._play(index, savepoints, conductor, solver)
        solver.rest()
        shard, digest = shard_name(index, len(self.skeleton.blocks)), ""
        if savepoints.journal is not None:
            with clock.phase("write"):
                tensors = shard_tensors(self.skeleton, index, solver.packed, solver.folded)
                digest = write_safetensors(self.out / shard, tensors)
        self.skeleton.unload(block.module, block.prefix)
        finished = {
            "block": index, "name": block.name, "shard": shard, "sha256": digest,
            "layers": solver.layers, **played, "seconds": self.lap(),
        }  # fmt: skip
        savepoints.finished(finished, played=conductor is not None)
        self._tell(index, first, None)

    def _play(
        self, index: int, savepoints: Savepoints, conductor: Conductor, solver: BlockSolver
    ) -> dict[str, Any]:
        """Plays a block with all batches; what the journal keeps of it."""
        block = self.skeleton.blocks[index]
        groups = conductor.probe(block)
        watch = None
        if groups and self.texts and self.ranks.alone:  # a rank's part of the text says too little
            total = len(self.texts.batches)
            batches = total - len(held_out(self.config, total))
            name = groups[0].names[0]
            watch = watched(self.skeleton.blocks, index, name, self.config, batches)
            groups[0].watch = watch
        sequential = self.mode == "true_sequential"
        routed = conductor.play(block, groups, solver.solve, sequential=sequential)
        activations, error = None, None
        if not block.is_head:
            with clock.phase("watch"):
                error = depth_error(conductor.quantized, self.ranks, conductor.present)
            activations = savepoints.save(index, conductor)
        return {
            "activations": activations, "experts": routed, "depth_error": error,
            "saturation": watch.record() if watch else None,
        }  # fmt: skip

    def _tell(self, index: int, first: int, layer: dict[str, Any] | None) -> None:
        if self.progress is not None and self.ranks.first:
            self.progress(Progress(index, len(self.skeleton.blocks), first, layer))
