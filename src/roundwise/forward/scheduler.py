"""ForwardScheduler: runs the model's own forward for all calibration batches, one block at a time.

Each batch runs `model(input_ids, use_cache=False)`, just as transformers wrote it, in a greenlet of its
own that stops at the places of `forward.batch.Phase`. The scheduler resumes one batch after the other,
so that all have reached the same place before a group is solved there. All run on one thread.

The first batch is a probe of a few tokens: it shows which linears read the same input, and in which
order. Blocks of towers are run with the batches that have pictures or sounds; all others wait in front
of the first block that they call. With a reference, each batch has a second one that runs through the
original model in lock-step: its activations in front of a group show how far the quantized model has
drifted.

This module handles hooks and their sums; it knows nothing of files, solving, or formats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from roundwise.forward.batch import (
    COUNTED,
    EXIT,
    GATHERED,
    at_experts,
    at_group,
    hidden,
)
from roundwise.forward.input_groups import InputGroup, trace_block
from roundwise.forward.paused_forwards import PausedForwards
from roundwise.model.blocks import Block
from roundwise.model.moe import dispatch_to_all


class ForwardScheduler(PausedForwards):
    """Runs the groups of blocks with all calibration batches; see `PausedForwards` for its arguments."""

    def replay_block(self, use_quantized: Callable[[], None]) -> None:
        """Runs the block that all batches have entered again, as an earlier run did that finished it.

        Args:
            use_quantized: puts the quantized weights into the block; it has its own before.
        """
        self.hooks.sequential = True
        self._advance([*self.probes, *self.references], EXIT)
        use_quantized()
        self._advance(self.quantized, EXIT)

    def discover_groups(self, block: Block) -> list[InputGroup]:
        """Runs the probes through the block; returns its groups, in the order of their first use.

        There are none if no batch calls the block.

        Raises:
            RunError: the block calls a linear more than once.
        """
        for experts in block.experts.values():
            experts.dispatch = partial(dispatch_to_all, experts, as_one=self.policy.gather == "all")
        if not self.probes:
            return []
        first, *others = self.probes
        with trace_block(block) as trace:
            self._advance([first], EXIT)
        self._advance(others, EXIT)
        trace.stream.append((block.name, hidden(first.output)))
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
        self.hooks.install(block, groups, sequential=sequential, drift=self._has_references)
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
        if self._has_references:
            self._weights.add(linears, before)
