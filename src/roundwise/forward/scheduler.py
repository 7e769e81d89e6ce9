"""The paused forward: the model's own forward runs, we only stop it in front of groups of linears.

The conductor leads all players (`stage.py`) from one stop to the next, so it knows that every batch
has reached the same place. The first player is a probe of a few tokens: it finds out which linears read
the same input and in which order. With a reference, each batch has a *twin* that plays the original
weights in lock-step: what it meets in front of a group tells how far the quantized model has drifted.

Knows hooks and what they sum up; nothing of files, solving, or formats.

The stage of the paused forward: a greenlet for each batch, and the gates where it stops.

Each calibration batch is a *player*: a greenlet that runs `model(input_ids, use_cache=False)` just as
transformers wrote it. Only one player runs at a time, all on one thread. A player stops

    ENTER      in front of a block, before it needs the block's weights
    COUNTED    after a pass through a block with experts that only counted their tokens (block mode)
    1, 3, …    in front of the first linear of each group that shares an input (sequential mode)
    0, 2, …    in front of experts, whose first group comes next: the router has chosen
    GATHERED   after a pass through the block that only gathered Hessians (block mode)
    EXIT       behind the block, with its output
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
    WeightSwap,
    hidden,
    stop,
)
from roundwise.forward.expert_tokens import ExpertCalibration
from roundwise.forward.hooks import CalibrationHooks
from roundwise.forward.input_groups import InputGroup, trace_block
from roundwise.forward.offload import CpuOffload, DiskOffload
from roundwise.model.blocks import Block
from roundwise.model.build import arguments
from roundwise.model.moe import visit_all
from roundwise.system.device import HOST, to_device
from roundwise.system.distributed import Ranks
from roundwise.system.half_matmul import cpu_half_matmul
from roundwise.system.timer import timer

#: Tokens of the probe: enough for any local attention pattern to be well formed.
PROBE_TOKENS = 8


class _Stage:
    """All players and the gates of all blocks; use as a context manager.

    Args:
        model: its parameters outside the blocks are loaded; those of a block are when it is played.
        blocks: the repeated blocks, in the order in which the model calls them.
        batches: calibration batches; all of them, whichever of them this rank plays.
        reference: also play the original model.
        skip: resuming, the number of finished blocks; they are not played.
        outputs: resuming, what the last finished block returned to each player by its key, by
            `Block.stack`.
        held_out: numbers of the batches that are summed up apart (`InputGroup.held`).
        ratio: see `InputGroup.add_drift`.
        policy: which tokens an expert's Hessian is made from.
        ranks: with whom the work is shared.
        device: where blocks are loaded and players play.
        parking: where players wait that find no room: on the host (only in block mode), or in a file.
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
        self.device, self.offload = device, offload
        self.model, self.blocks, self.skip = model, blocks, skip
        self.policy, self.ranks = policy or ExpertCalibration(), ranks or Ranks()
        self.hooks = CalibrationHooks(
            self._current, held_out=held_out, ratio=ratio, policy=self.policy
        )
        batches = [batch.to(device) for batch in batches]
        probe = Batch(batches[0].input_ids[:1, :PROBE_TOKENS], None)
        self.probe_player = PausedBatch(probe, -1)
        self.quantized = [PausedBatch(batch, i) for i, batch in self.ranks.shard(batches).items()]
        if reference:
            for player in self.quantized:
                player.reference = PausedBatch(
                    player.batch, player.number, player, is_reference=True
                )
        self.originals = [player.reference for player in self.quantized if player.reference]
        self.players = [self.probe_player, *self.originals, *self.quantized]
        for stack, saved in (outputs or {}).items():
            for player in self.players:
                player.resumed_outputs[stack] = saved[player.key]
        self._trying = False
        self._playing: dict[greenlet, PausedBatch] = {}
        self._variants = WeightSwap()
        self._grad = True

    def __enter__(self) -> Self:
        # Grad mode belongs to the thread, which all players share: switched off here, once.
        self._grad = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        for index, block in enumerate(self.blocks):
            block.module.forward = self._paused_forward(index, block.module.forward)
        for player in self.players:
            player.task = greenlet(self._run_model)
            self._playing[player.task] = player
        return self

    def __exit__(self, *_: object) -> None:
        for player in self.players:
            if player.task:  # running: unwind its frames
                player.task.throw(GreenletExit)
        for block in self.blocks:
            vars(block.module).pop("forward", None)
        self.hooks.end()
        if self.offload is not None:
            self.offload.close()
        torch.set_grad_enabled(self._grad)

    def onloaded(self, key: str) -> AbstractContextManager[None]:
        """While it is entered, what the player of a key holds can be looked at."""
        if self.offload is None or key == self.probe_player.key:
            return nullcontext()
        return self.offload.onloaded(next(p for p in self.players if p.key == key))

    def outputs(self) -> dict[str, Any]:
        """What the block returned to each player by its key, all standing behind it."""
        return {player.key: player.output for player in self.players}

    def replace_outputs(self, outputs: dict[str, Any]) -> None:
        """Lets the players go on with these outputs instead of their own."""
        for player in self.players:
            player.output = outputs[player.key]

    def _run_model(self, player: PausedBatch) -> None:
        self.model(**arguments(self.model, player.batch.input_ids, player.batch.mask))

    def _advance(self, player: PausedBatch, target: int) -> None:
        """Lets a player run until it stops at `target` or beyond."""
        while player.stopped_at < target:
            self._resume(player)

    def _resume(self, player: PausedBatch) -> None:
        assert player.task is not None
        self._variants.show(is_reference=player.is_reference)
        offload = self.offload if player.number >= 0 else None
        with timer.phase("forward"), cpu_half_matmul():
            if offload is not None:
                offload.onload(player)
            stopped = player.task.switch() if player.task else player.task.switch(player)
            player.stopped_at = EXIT if player.task.dead else stopped
            if offload is not None:
                offload.offload(player)

    def _paused_forward(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward with the stops around it."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            player, surveyed = self._current(), False
            if index < self.skip:
                # Finished earlier: all of them return what the last one did, only that one counts.
                return to_device(player.resumed_outputs[self.blocks[index].stack], self.device)
            player.block_inputs, player.output = (args, kwargs), None
            stop(ENTER)
            if player.number >= 0 and not self.hooks.sequential:
                if self.hooks.counting:
                    original(*args, **kwargs)
                    stop(COUNTED)
                player.output = original(*args, **kwargs)
                surveyed = self._trying
                stop(GATHERED)
                while self._trying:
                    player.candidate_output = original(*args, **kwargs)
                    stop(GATHERED)
            if player.output is None or not (player.is_reference or surveyed):
                player.output = original(*args, **kwargs)
            stop(EXIT)
            output, player.block_inputs, player.output = player.output, None, None
            return to_device(output, self.device)

        return forward

    def _current(self) -> PausedBatch:
        return self._playing[getcurrent()]


class ForwardScheduler(_Stage):
    """Leads all players through the blocks in lock-step; arguments are those of `_Stage`."""

    def advance_to_block(self) -> None:
        """Brings every player to the entrance of the next block."""
        self._variants = WeightSwap()
        if self.offload is not None:
            self.offload.mark_shared()
        for player in self.players:
            self._resume(player)
            if player.stopped_at != ENTER:
                raise RunError("the model does not call its blocks one after another, each once")

    def discover_groups(self, block: Block) -> list[InputGroup]:
        """Plays the block with the probe: its groups, in the order in which they are reached.

        Raises:
            RunError: the block calls a linear more than once.
        """
        for experts in block.experts.values():
            experts.visits = partial(visit_all, experts, as_one=self.policy.gather == "all")
        with trace_block(block) as notes:
            self._advance(self.probe_player, EXIT)
        notes.stream.append((block.name, hidden(self.probe_player.output)))
        return notes.groups()

    def run_block(
        self,
        block: Block,
        groups: list[InputGroup],
        solve: Callable[[InputGroup], None],
        *,
        sequential: bool,
    ) -> dict[str, list[int]]:
        """Plays the block with all batches and solves its groups.

        Args:
            block: the block all players have entered.
            groups: what `discover_groups` returned.
            solve: replaces the weights of a group's linears; its Hessian is complete.
            sequential: stop at every group, so that each sees already quantized predecessors;
                otherwise gather all Hessians in a first pass, and play the block again. The head
                is played in sequence always, so that there are no logits to keep.

        Returns:
            For each module of experts, how many tokens its router sent to each.
        """
        sequential = sequential or block.is_head
        self.hooks.begin(block, groups, sequential=sequential, drift=bool(self.originals))
        if not sequential:
            self._gather(groups)
        for index, group in enumerate(groups):
            if sequential:
                self._reach(index, groups)
            self._solve(block, group, solve)
        for player in [*self.originals, *self.quantized]:
            if not block.is_head:  # nobody needs logits
                self._advance(player, EXIT)
            for held in (
                player.reference_activations,
                player.residual_inputs,
                player.expert_tokens,
            ):
                held.clear()
        for routing in self.hooks.expert_routings:
            routing.join(self.ranks)
        tokens = {routing.name: routing.tokens.tolist() for routing in self.hooks.expert_routings}
        self.hooks.end()
        return tokens

    def try_weights(
        self,
        block: Block,
        groups: list[InputGroup],
        measure: Callable[[Callable[[], list[torch.Tensor]], list[torch.Tensor]], None],
        *,
        tokens: int,
    ) -> None:
        """Plays the block with its own weights, and as often with others as it takes to compare them.

        Args:
            block: the block all players have entered.
            groups: what `discover_groups` returned; their Hessians are complete when `measure` is called.
            measure: called with a function that plays the block with its present weights, and with
                what the block returned with its own; it leaves the weights as they were.
            tokens: of the first batches that are played again, about.
        """
        self.hooks.begin(block, groups, sequential=False, drift=False)
        self._trying = True
        self._gather(groups)
        again, played = [], 0
        for player in self.quantized:
            if played < tokens:
                again.append(player)
                played += player.batch.input_ids.numel()

        def attempt() -> list[torch.Tensor]:
            for player in again:
                self._resume(player)
            return [hidden(player.candidate_output) for player in again]

        measure(attempt, [hidden(player.output) for player in again])
        self._trying = False
        for player in self.quantized:
            self._advance(player, EXIT)
            player.candidate_output = None
            player.expert_tokens.clear()
        self.hooks.end()

    def _reach(self, index: int, groups: list[InputGroup]) -> None:
        """Sequential mode: leads all players in front of a group."""
        players = [*self.originals, *self.quantized]
        for routing in self.hooks.expert_routings:
            if routing.first == index:
                for player in players:
                    self._advance(player, 2 * index)
                routing.decide(groups, self.ranks)
        for player in players:
            self._advance(player, 2 * index + 1)

    def _gather(self, groups: list[InputGroup]) -> None:
        """Block mode: gathers all Hessians, one batch after another."""
        found = self.hooks.expert_routings
        if found and self.policy.gather == "routed":
            self.hooks.counting = True
            for player in self.quantized:
                self._advance(player, COUNTED)
            self.hooks.counting = False
            for routing in found:
                routing.decide(groups, self.ranks)
        for player in self.quantized:
            both = [player.reference, player] if player.reference is not None else [player]
            for place in [*(2 * routing.first for routing in found), GATHERED]:
                for each in both:
                    self._advance(each, place)

    def _solve(self, block: Block, group: InputGroup, solve: Callable[[InputGroup], None]) -> None:
        """Solves a group, and remembers its original weights for the original players."""
        self._variants.show(is_reference=False)
        group.join(self.ranks, self.device)
        linears = [block.linears[name] for name in group.names]
        before: list[Any] = [linear.weight for linear in linears]
        solve(group)
        group.forget()
        if self.originals:
            self._variants.add(linears, before)
