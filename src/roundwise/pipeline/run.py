"""The run from checkpoint to checkpoint, one block at a time.

For each block: read its weights; let all calibration batches play it, solving each group of linears
where they stop; write the shard; record it in the journal; drop the weights. What is finished stays
finished: the same command goes on at the first block that is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.awq import round_searched
from roundwise.core.clock import clock
from roundwise.core.quantized import QuantizedWeight
from roundwise.core.solver import round_to_nearest, solve
from roundwise.errors import NumericalError, OutputError, RunError, SingularError
from roundwise.models.blocks import Block, set_weight, weight_of
from roundwise.models.files import file_digest
from roundwise.models.formats import encode
from roundwise.models.skeleton import Skeleton
from roundwise.models.writer import write_safetensors
from roundwise.pipeline import environment
from roundwise.pipeline.calibration import Calibration
from roundwise.pipeline.conduct import Conductor
from roundwise.pipeline.damping import held_out
from roundwise.pipeline.environment import difference, threads
from roundwise.pipeline.finish import finish, shard_name, timings
from roundwise.pipeline.inputs import Inputs
from roundwise.pipeline.journal import Journal
from roundwise.pipeline.memory import Mode, reusing
from roundwise.pipeline.plan import Memory, plan_memory
from roundwise.pipeline.players import depth_error
from roundwise.pipeline.prescale import Prescaler, Scaling
from roundwise.pipeline.probe import Group
from roundwise.pipeline.record import layer_record, shard_tensors
from roundwise.pipeline.routing import Policy
from roundwise.pipeline.saturation import Saturation


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
    begun: float = field(default_factory=time.monotonic)
    """time.monotonic() when preparing began."""
    prescaler: Prescaler | None = None
    memory: Memory | None = None
    """What the run is expected to hold; set with the fingerprint."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """`warnings` and `not_as_asked`, for the record."""
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds by kind of work, of this process."""

    def forecast(self, mode: Mode | None) -> Memory:
        """What the run would hold in a mode; None: in the one that memory allows."""
        return plan_memory(
            self.skeleton, self.config,
            tokens=self.texts.tokens if self.texts else 0,
            batch=max(b.input_ids.numel() for b in self.texts.batches) if self.texts else 0,
            mode=mode, budget=self.budget,
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
            **environment.deciding(),
            **{key: known[key] for key in ("threads",) if key in known},
        }

    def work(self, journal: Journal) -> dict[str, Any]:
        """All blocks that are not finished, then the rest of the checkpoint."""
        clock.add("start", time.monotonic() - self.begun - sum(clock.seconds.values()))
        known, done = journal.read()
        fingerprint = self.fingerprint(known)
        if known is None:
            journal.start(fingerprint)
        elif known != fingerprint:
            raise OutputError(
                f"{self.out} holds an unfinished run that differs in {difference(known, fingerprint)}: "
                "use the same settings to go on, or --restart to begin anew"
            )
        journal.trim()
        for line in done:
            shard = self.out / line["shard"]
            if not shard.exists() or file_digest(shard) != line["sha256"]:
                raise RunError(
                    f"{shard} was changed or removed since it was written: use --restart"
                )
        journal.check_outputs()
        if len(done) < len(self.skeleton.blocks):
            with threads(fingerprint["threads"]):
                self._blocks(journal, done)
        with clock.phase("finish"):
            return finish(
                self.skeleton, self.out, self.config, fingerprint, self.given, done,
                lambda: {**timings(done, self.lap()), **self.notes},
            )  # fmt: skip

    def lap(self) -> dict[str, float]:
        """Seconds by kind of work since the last call."""
        taken = clock.take()
        for phase, seconds in taken.items():
            self.spent[phase] = self.spent.get(phase, 0.0) + seconds
        return taken

    def _blocks(self, journal: Journal, done: list[dict[str, Any]]) -> None:
        first = len(done)
        if self.texts is None:
            for index in range(first, len(self.skeleton.blocks)):
                self._block(index, journal, done, first, None)
            return
        self.skeleton.load_outside_blocks()
        outputs = {
            stack: journal.load_outputs(saved) for stack, saved in self._activations(done).items()
        }
        with Conductor(
            self.skeleton.model,
            self.skeleton.blocks,
            self.texts.batches,
            reference=self.config.needs_reference,
            ratio=self.config.alpha / self.config.beta if self.config.beta else None,
            skip=first,
            outputs=outputs,
            held_out=held_out(self.config, len(self.texts.batches)),
            policy=Policy(self.config.experts, self.config.expert_tokens),
        ) as conductor:
            for index in range(first, len(self.skeleton.blocks)):
                conductor.enter()
                if index == first:
                    self.skeleton.release_pages()
                self._block(index, journal, done, first, conductor)

    def _block(
        self,
        index: int,
        journal: Journal,
        done: list[dict[str, Any]],
        first: int,
        conductor: Conductor | None,
    ) -> None:
        """One block from weights on disk to shard on disk."""
        block = self.skeleton.blocks[index]
        solved: dict[str, dict[str, torch.Tensor]] = {}
        layers: list[dict[str, Any]] = []
        folded: dict[str, torch.Tensor] = {}

        @reusing()
        def solve_group(group: Group) -> None:
            # Everybody is behind the linears of earlier groups by now.
            self.skeleton.release_pages(list(solved))
            inputs = Inputs(group)
            scaling = self._prescale(block, group, inputs)
            folded.update(scaling.tensors)
            inputs.choose_damping(self._weights(block, group, scaling))
            for name in group.names:
                settings = self.config.for_module(name)
                if settings is None:
                    continue
                linear = block.linears[name]
                with clock.phase("solve"):
                    q = self._solve(name, scaling.apply(weight_of(linear)), inputs, settings)
                with clock.phase("pack"):
                    set_weight(linear, scaling.undo(q.dequantize(weight_of(linear).dtype)))
                    solved[name] = encode(q, settings)
                layers.append(layer_record(name, q, settings, inputs.tokens))
                layers[-1]["fallback"] = q.fallback or group.fallback
                layers[-1] |= scaling.record(name) | inputs.damping.record(settings)
                self._tell(index, first, layers[-1])

        with clock.phase("read"):
            self.skeleton.load(block.module, block.prefix)
        activations, routed = None, dict[str, list[int]]()
        watch, error = None, None
        if conductor is not None:
            groups = conductor.probe(block)
            watch = self._watch(index, block, groups)
            sequential = self.mode == "true_sequential"
            routed = conductor.play(block, groups, solve_group, sequential=sequential)
            if not block.is_head:
                with clock.phase("watch"):
                    error = depth_error(conductor.quantized)
                with clock.phase("write"):
                    activations = journal.save_outputs(index, conductor.outputs())
                # From here on the batches live in the file just written, not in memory.
                conductor.replace_outputs(journal.load_outputs(activations))
        # Linears that the model's forward never called, or all of them without calibration.
        solve_group(Group([name for name in block.linears if name not in solved]))
        shard = shard_name(index, len(self.skeleton.blocks))
        with clock.phase("write"):
            digest = write_safetensors(
                self.out / shard, shard_tensors(self.skeleton, index, solved, folded)
            )
        self.skeleton.unload(block.module, block.prefix)
        line = {
            "block": index, "shard": shard, "sha256": digest,
            "activations": activations, "layers": layers, "experts": routed,
            "name": block.name, "depth_error": error,
            "saturation": watch.record() if watch else None, "seconds": self.lap(),
        }  # fmt: skip
        done.append(line)
        kept = self._activations(done).values()
        journal.block_done(line, keep={saved["file"] for saved in kept})
        self._tell(index, first, None)

    def _activations(self, done: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """What the last finished block of each list of blocks returned: all that is needed to go on."""
        blocks = zip(self.skeleton.blocks, done, strict=False)
        return {block.stack: line["activations"] for block, line in blocks if line["activations"]}

    def _watch(self, index: int, block: Block, groups: list[Group]) -> Saturation | None:
        """In the first, the middle and the last block: would more text help its first group?"""
        name = groups[0].names[0] if groups else ""
        settings = self.config.for_module(name)
        blocks = sum(not each.is_head for each in self.skeleton.blocks)
        if index not in (0, blocks // 2, blocks - 1) or not groups or not self.texts:
            return None
        if settings is None or settings.method != "gptq":
            return None
        total = len(self.texts.batches)
        batches = total - len(held_out(self.config, total))
        groups[0].watch = Saturation(name, weight_of(block.linears[name]), settings, batches)
        return groups[0].watch

    def _prescale(self, block: Block, group: Group, inputs: Inputs) -> Scaling:
        """Scales for the group's input, if any; `inputs` becomes that of the scaled weights."""
        if self.prescaler is None or inputs.fit is None:
            return Scaling()
        with clock.phase("choose"):
            scaling = self.prescaler.search(block, group.names, inputs.fit.H)
        for part in (inputs.fit, inputs.held):
            if part is not None and scaling.s is not None:
                part.divide(scaling.s)
        return scaling

    def _weights(
        self, block: Block, group: Group, scaling: Scaling
    ) -> Iterator[tuple[torch.Tensor, QuantizeConfig]]:
        """The weights of a group that are to be quantized, and their settings."""
        for name in group.names:
            settings = self.config.for_module(name)
            if settings is not None:
                yield scaling.apply(weight_of(block.linears[name])), settings

    def _solve(
        self, name: str, W: torch.Tensor, inputs: Inputs, settings: QuantizeConfig
    ) -> QuantizedWeight:
        """One weight; a named error, or rounding to nearest with the reason recorded."""
        try:
            if settings.method == "rtn":
                return round_to_nearest(W, settings)
            try:
                if settings.method == "awq":
                    return round_searched(W, inputs.moment(), settings)
                lost = inputs.lost(W, settings)
                return solve(W, inputs.prepared(settings), settings, lost=lost)
            except SingularError as error:
                return round_to_nearest(W, settings, fallback=str(error))
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from error

    def _tell(self, index: int, first: int, layer: dict[str, Any] | None) -> None:
        if self.progress is not None:
            self.progress(Progress(index, len(self.skeleton.blocks), first, layer))
