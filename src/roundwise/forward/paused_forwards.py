"""PausedForwards: the suspended forwards of all calibration batches, which stop at blocks and in them.

Each batch runs `model(input_ids, use_cache=False)`, just as transformers wrote it, in a greenlet of its
own that stops at the places of `forward.batch.Phase`. All run on one thread, one at a time. This module
knows where batches stop and in which order they reach blocks; it does not know groups and their sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
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
    pause,
    probes,
    run_block,
)
from roundwise.forward.expert_tokens import ExpertCalibration
from roundwise.forward.hooks import CalibrationHooks, OutsideModel
from roundwise.forward.offload import CpuOffload, DiskOffload
from roundwise.model.blocks import Block, wrapped_forwards
from roundwise.model.build import forward_kwargs
from roundwise.model.foreign_errors import foreign_errors
from roundwise.system.device import HOST, to_device
from roundwise.system.distributed import Ranks
from roundwise.system.half_matmul import cpu_half_matmul, needs_half_matmul, outside_model
from roundwise.system.timer import timer


class PausedForwards:
    """Runs all calibration batches through the blocks of a model; use it as a context manager.

    Args:
        model: parameters outside the blocks are loaded; those of a block are loaded before it runs.
        blocks: the repeated blocks, in the order in which the model calls them.
        batches: all calibration batches; this rank runs its share of them.
        reference: also run the original model.
        skip: number of blocks that an earlier run has finished; only those of towers are run again.
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
        self.order = [i for i, block in enumerate(blocks) if i >= skip or block.is_tower]
        """Numbers of the blocks that batches run through."""
        self._matmul = cpu_half_matmul if changed else nullcontext
        self._outside: OutsideModel = outside_model if changed else nullcontext
        self.hooks = CalibrationHooks(
            self._current, self._outside, held_out=held_out, ratio=ratio, policy=self.policy
        )
        batches = [batch.to(device) for batch in batches]
        self.probes = probes(batches, media=any(block.is_tower for block in blocks))
        self.quantized = [PausedBatch(batch, i) for i, batch in self.ranks.shard(batches).items()]
        if reference:
            for batch in self.quantized:
                batch.reference = PausedBatch(batch.batch, batch.number, batch, is_reference=True)
        self.references = [batch.reference for batch in self.quantized if batch.reference]
        self.batches = [*self.probes, *self.references, *self.quantized]
        self._has_references = reference
        self._left = iter(self.order)
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
        """Runs every batch to the entrance of the next block, or of a later one if it is of a tower.

        `probes`, `references` and `quantized` are those at the next block from then on.
        """
        self._weights = WeightSwap()
        if self.offload is not None:
            self.offload.mark_shared()
        index = next(self._left)
        for batch in self.batches:
            if batch.block < index:
                self._resume(batch)
            passed = batch.block > index and not self.blocks[index].is_tower
            if batch.stopped_at != ENTER or batch.block < index or passed:
                raise RunError("the model does not call its blocks one after another, each once")
        here = [batch for batch in self.batches if batch.block == index]
        self.probes = [batch for batch in here if batch.is_probe]
        self.references = [batch for batch in here if batch.is_reference]
        self.quantized = [b for b in here if not b.is_probe and not b.is_reference]

    def onloaded(self, key: str) -> AbstractContextManager[None]:
        """Context manager: the tensors of the batch with this key are in memory."""
        batch = next(batch for batch in self.batches if batch.key == key)
        if self.offload is None or batch.is_probe:
            return nullcontext()
        return self.offload.onloaded(batch)

    def _advance(self, batches: Sequence[PausedBatch], target: Stop) -> None:
        """Resumes each batch until it has stopped at `target` or beyond."""
        for batch in batches:
            while batch.stopped_at < target:
                self._resume(batch)

    def _resume(self, batch: PausedBatch) -> None:
        """Runs a batch up to its next stop."""
        assert batch.task is not None
        self._weights.use(original=batch.is_reference)
        offload = None if batch.is_probe else self.offload
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
            if index < self.skip and not block.is_tower:
                # An earlier run finished these blocks. Each returns the saved output of the last one:
                # only that one is used.
                return to_device(batch.resumed_outputs[block.stack], self.device)
            batch.block, batch.block_inputs, batch.output = index, (args, kwargs), None
            self._pause(ENTER)
            if not batch.is_probe and not self.hooks.sequential:
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
