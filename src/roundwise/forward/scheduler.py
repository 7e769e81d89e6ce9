"""ForwardScheduler: runs the model's own forward for all calibration batches, one block at a time.

Each batch runs `model(input_ids, use_cache=False)`, just as transformers wrote it, in a greenlet of its
own that stops at the places of `forward.batch.Phase`. The scheduler resumes one batch after the other,
so that all have reached the same place before a group is solved there. All run on one thread.

The first batch is a probe of a few tokens: it shows which linears read the same input, and in which
order. With a reference, each batch has a second one that runs through the original model in lock-step:
its activations in front of a group show how far the quantized model has drifted.

This module handles hooks and their sums; it knows nothing of files, solving, or formats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, Self

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from roundwise.calibration.windows import Batch
from roundwise.errors import RunError
from roundwise.forward.batch import (
    COUNTED,
    ENTER,
    EXIT,
    GATHERED,
    PausedBatch,
    Stop,
    WeightSwap,
    at_experts,
    at_group,
    hidden,
    pause,
    run_block,
)
from roundwise.forward.expert_tokens import ExpertCalibration
from roundwise.forward.hooks import CalibrationHooks, OutsideModel
from roundwise.forward.input_groups import InputGroup, trace_block
from roundwise.forward.offload import CpuOffload, DiskOffload
from roundwise.model.blocks import Block, wrapped_forwards
from roundwise.model.build import forward_kwargs
from roundwise.model.foreign_errors import foreign_errors
from roundwise.model.moe import dispatch_to_all
from roundwise.system.device import HOST, to_device
from roundwise.system.distributed import Ranks
from roundwise.system.half_matmul import cpu_half_matmul, needs_half_matmul, outside_model
from roundwise.system.timer import timer

#: Tokens of the probe: enough for any local attention pattern to be well formed.
PROBE_TOKENS = 8


class ForwardScheduler:
    """Runs all calibration batches through the blocks of a model; use it as a context manager.

    Args:
        model: parameters outside the blocks are loaded; those of a block are loaded before it runs.
        blocks: the repeated blocks, in the order in which the model calls them.
        batches: all calibration batches; this rank runs its share of them.
        reference: also run the original model.
        skip: number of blocks that an earlier run has finished; they are not run again.
        outputs: with `skip`, what the last finished block returned, by `Block.stack` and then by
            `PausedBatch.key`.
        held_out: numbers of the batches whose sums are kept apart (`InputGroup.held`).
        ratio: factor of the original model's outputs; see `InputGroup.add_drift`.
        policy: which tokens an expert's Hessian is made from.
        ranks: the processes of the run, which share the batches.
        device: where blocks are loaded and batches run.
        offload: keeps paused batches that do not fit into memory: on the host of an accelerator (block
            mode only), or in a file. None: they stay in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        batches: list[Batch],
        *,
        reference: bool = False,
        skip: int = 0,
        outputs: dict[int, dict[str, Any]] | None = None,
        held_out: frozenset[int] = frozenset(),
        ratio: float | None = None,
        policy: ExpertCalibration | None = None,
        ranks: Ranks | None = None,
        device: torch.device = HOST,
        offload: CpuOffload | DiskOffload | None = None,
    ) -> None:
        self.model, self.blocks, self.skip = model, blocks, skip
        self.policy, self.ranks = policy or ExpertCalibration(), ranks or Ranks()
        self.device, self.offload = device, offload
        dtypes = (parameter.dtype for parameter in model.parameters())
        ragged = any(block.experts for block in blocks)
        changed = needs_half_matmul(dtypes, device, ragged=ragged)
        self._matmul = cpu_half_matmul if changed else nullcontext
        self._outside: OutsideModel = outside_model if changed else nullcontext
        self.hooks = CalibrationHooks(
            self._current, self._outside, held_out=held_out, ratio=ratio, policy=self.policy
        )
        batches = [batch.to(device) for batch in batches]
        self.probe = PausedBatch(batches[0].probe(PROBE_TOKENS), -1)
        self.quantized = [PausedBatch(batch, i) for i, batch in self.ranks.shard(batches).items()]
        if reference:
            for batch in self.quantized:
                batch.reference = PausedBatch(batch.batch, batch.number, batch, is_reference=True)
        self.references = [batch.reference for batch in self.quantized if batch.reference]
        self.batches = [self.probe, *self.references, *self.quantized]
        for stack, saved in (outputs or {}).items():
            for batch in self.batches:
                batch.resumed_outputs[stack] = saved[batch.key]
        self._trying = False
        self._running: dict[greenlet, PausedBatch] = {}
        self._weights = WeightSwap()
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        # Grad mode belongs to the thread, which all batches share: switched off here, once.
        self._exit.enter_context(torch.no_grad())
        self._exit.enter_context(wrapped_forwards(self.blocks, self._paused_forward))
        for batch in self.batches:
            batch.task = greenlet(self._run_model)
            self._running[batch.task] = batch
        return self

    def __exit__(self, *_: object) -> None:
        for batch in self.batches:
            if batch.task:  # running: unwind its frames
                batch.task.throw(GreenletExit)
        self.hooks.remove()
        if self.offload is not None:
            self.offload.close()
        self._exit.close()

    def advance_to_block(self) -> None:
        """Runs every batch to the entrance of the next block."""
        self._weights = WeightSwap()
        if self.offload is not None:
            self.offload.mark_shared()
        for batch in self.batches:
            self._resume(batch)
            if batch.stopped_at != ENTER:
                raise RunError("the model does not call its blocks one after another, each once")

    def discover_groups(self, block: Block) -> list[InputGroup]:
        """Runs the probe through the block and returns its groups, in the order of their first use.

        Raises:
            RunError: the block calls a linear more than once.
        """
        for experts in block.experts.values():
            experts.dispatch = partial(dispatch_to_all, experts, as_one=self.policy.gather == "all")
        with trace_block(block) as trace:
            self._advance([self.probe], EXIT)
        trace.stream.append((block.name, hidden(self.probe.output)))
        return trace.groups()

    def run_block(
        self,
        block: Block,
        groups: list[InputGroup],
        solve: Callable[[InputGroup], None],
        *,
        sequential: bool,
    ) -> dict[str, list[int]]:
        """Runs the block with all batches and solves its groups.

        Args:
            block: the block that all batches have entered.
            groups: from `discover_groups`.
            solve: replaces the weights of a group's linears; the group's Hessian is complete then.
            sequential: stop at every group, so that each sees already quantized predecessors;
                otherwise sum up all Hessians in a first pass, and run the block again. The head is
                always run in sequence, so that no logits are kept.

        Returns:
            Module of experts -> how many tokens its router sent to each.
        """
        sequential = sequential or block.is_head
        self.hooks.install(block, groups, sequential=sequential, drift=bool(self.references))
        if not sequential:
            self._gather(groups)
        for index, group in enumerate(groups):
            if sequential:
                self._advance_to_group(index, groups)
            self._solve(block, group, solve)
        for batch in [*self.references, *self.quantized]:
            if not block.is_head:  # nobody needs logits
                self._advance([batch], EXIT)
            batch.clear_block()
        tokens = {routing.name: routing.all_tokens(self.ranks) for routing in self.hooks.routings}
        self.hooks.remove()
        return tokens

    def try_weights(
        self,
        block: Block,
        groups: list[InputGroup],
        measure: Callable[[Callable[[], list[torch.Tensor]], list[torch.Tensor]], None],
        *,
        tokens: int,
    ) -> None:
        """Runs the block with its own weights, and again with others as often as `measure` asks for.

        Args:
            block: the block that all batches have entered.
            groups: from `discover_groups`; their Hessians are complete when `measure` is called.
            measure: called with a function that runs the block with its present weights and returns
                its outputs, and with the outputs that its own weights gave; it leaves the weights as
                they were.
            tokens: about how many tokens are run again; whole batches, from the first on.
        """
        self.hooks.install(block, groups, sequential=False, drift=False)
        self._trying = True
        self._gather(groups)
        again, count = [], 0
        for batch in self.quantized:
            if count < tokens:
                again.append(batch)
                count += batch.batch.input_ids.numel()

        def attempt() -> list[torch.Tensor]:
            for batch in again:
                self._resume(batch)
            return [hidden(batch.candidate_output) for batch in again]

        measure(attempt, [hidden(batch.output) for batch in again])
        self._trying = False
        for batch in self.quantized:
            self._advance([batch], EXIT)
            batch.candidate_output = None
            batch.clear_block()
        self.hooks.remove()

    def outputs(self) -> dict[str, Any]:
        """`PausedBatch.key` -> what the block returned, for all batches paused after it."""
        return {batch.key: batch.output for batch in self.batches}

    def replace_outputs(self, outputs: dict[str, Any]) -> None:
        """Continues all batches with these outputs instead of their own."""
        for batch in self.batches:
            batch.output = outputs[batch.key]

    def onloaded(self, key: str) -> AbstractContextManager[None]:
        """Context manager: the tensors of the batch with this key are in memory."""
        if self.offload is None or key == self.probe.key:
            return nullcontext()
        return self.offload.onloaded(next(batch for batch in self.batches if batch.key == key))

    def _advance_to_group(self, index: int, groups: list[InputGroup]) -> None:
        """Sequential mode: runs all batches up to group number `index`."""
        batches = [*self.references, *self.quantized]
        for routing in self.hooks.routings:
            if routing.first == index:
                self._advance(batches, at_experts(index))
                routing.decide(groups, self.ranks)
        self._advance(batches, at_group(index))

    def _gather(self, groups: list[InputGroup]) -> None:
        """Block mode: sums up all Hessians, one batch after another."""
        routings = self.hooks.routings
        if routings and self.policy.gather == "routed":
            self.hooks.counting = True
            self._advance(self.quantized, COUNTED)
            self.hooks.counting = False
            for routing in routings:
                routing.decide(groups, self.ranks)
        for batch in self.quantized:
            both = [batch.reference, batch] if batch.reference is not None else [batch]
            for stop in [*(at_experts(routing.first) for routing in routings), GATHERED]:
                self._advance(both, stop)

    def _solve(self, block: Block, group: InputGroup, solve: Callable[[InputGroup], None]) -> None:
        """Solves a group; keeps its original weights for the batches of the original model."""
        self._weights.use(original=False)
        group.all_reduce(self.ranks, self.device)
        group.drop_unmatched_drift(self.ranks)
        linears = [block.linears[name] for name in group.names]
        before: list[Any] = [linear.weight for linear in linears]
        solve(group)
        group.clear()
        if self.references:
            self._weights.add(linears, before)

    def _advance(self, batches: Sequence[PausedBatch], target: Stop) -> None:
        """Resumes each batch until it has stopped at `target` or beyond."""
        for batch in batches:
            while batch.stopped_at < target:
                self._resume(batch)

    def _resume(self, batch: PausedBatch) -> None:
        """Runs a batch up to its next stop."""
        assert batch.task is not None
        self._weights.use(original=batch.is_reference)
        offload = self.offload if batch.number >= 0 else None
        with timer.phase("forward"):
            if offload is not None:
                offload.onload(batch)
            stopped = batch.task.switch() if batch.task else batch.task.switch(batch)
            batch.stopped_at = EXIT if batch.task.dead else stopped
            if offload is not None:
                offload.offload(batch)

    def _run_model(self, batch: PausedBatch) -> None:
        """The body of a batch's greenlet: the whole forward, with its stops."""
        given = batch.batch
        kwargs = forward_kwargs(self.model, given.input_ids, given.mask, given.inputs)
        what = f"{type(self.model).__name__} fails on calibration text outside blocks"
        with self._matmul(), foreign_errors(what):
            self.model(**kwargs)

    def _paused_forward(
        self, index: int, block: Block, original: Callable[..., Any]
    ) -> Callable[..., Any]:
        """A block's forward with the stops around it."""

        def compute(*args: Any, **kwargs: Any) -> Any:
            return run_block(block, original, args, kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            batch, tried = self._current(), False
            if index < self.skip:
                # An earlier run finished these blocks. Each returns the saved output of the last one:
                # only that one is used.
                return to_device(batch.resumed_outputs[block.stack], self.device)
            batch.block_inputs, batch.output = (args, kwargs), None
            self._pause(ENTER)
            if batch.number >= 0 and not self.hooks.sequential:
                if self.hooks.counting:
                    compute(*args, **kwargs)
                    self._pause(COUNTED)
                batch.output = compute(*args, **kwargs)
                tried = self._trying
                self._pause(GATHERED)
                while self._trying:
                    batch.candidate_output = compute(*args, **kwargs)
                    self._pause(GATHERED)
            if batch.output is None or not (batch.is_reference or tried):
                batch.output = compute(*args, **kwargs)
            self._pause(EXIT)
            output, batch.block_inputs, batch.output = batch.output, None, None
            with self._outside():
                return to_device(output, self.device)

        return forward

    def _pause(self, stop: Stop) -> None:
        """Stops the running batch, in the wrapper of a block's forward."""
        with self._outside():
            pause(stop)

    def _current(self) -> PausedBatch:
        """The batch that is running."""
        return self._running[getcurrent()]
