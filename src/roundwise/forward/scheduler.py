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
from roundwise.forward.batch import COUNTED, ENTER, EXIT, GATHERED, Player, Variants, hidden, stop
from roundwise.forward.expert_tokens import Policy
from roundwise.forward.hooks import Gatherer
from roundwise.forward.input_groups import Group, taking_notes
from roundwise.forward.offload import Parking, Shelf
from roundwise.model.blocks import Block
from roundwise.model.build import arguments
from roundwise.model.moe import visit_all
from roundwise.system.device import HOST, moved
from roundwise.system.distributed import Ranks
from roundwise.system.half_matmul import widening
from roundwise.system.timer import clock

#: Tokens of the probe: enough for any local attention pattern to be well formed.
PROBE_TOKENS = 8


class Stage:
    """All players and the gates of all blocks; use as a context manager.

    Args:
        model: its parameters outside the blocks are loaded; those of a block are when it is played.
        blocks: the repeated blocks, in the order in which the model calls them.
        batches: calibration batches; all of them, whichever of them this rank plays.
        reference: also play the original model.
        skip: resuming, the number of finished blocks; they are not played.
        outputs: resuming, what the last finished block returned to each player by its key, by
            `Block.stack`.
        held_out: numbers of the batches that are summed up apart (`Group.held`).
        ratio: see `Group.add_drift`.
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
        policy: Policy | None = None,
        ranks: Ranks | None = None,
        device: torch.device = HOST,
        parking: Parking | Shelf | None = None,
    ) -> None:
        self.device, self.parking = device, parking
        self.model, self.blocks, self.skip = model, blocks, skip
        self.policy, self.ranks = policy or Policy(), ranks or Ranks()
        self.gatherer = Gatherer(self._current, held_out=held_out, ratio=ratio, policy=self.policy)
        batches = [batch.to(device) for batch in batches]
        probe = Batch(batches[0].input_ids[:1, :PROBE_TOKENS], None)
        self.probe_player = Player(probe, -1)
        self.quantized = [Player(batch, i) for i, batch in self.ranks.share(batches).items()]
        if reference:
            for player in self.quantized:
                player.twin = Player(player.batch, player.number, player, original=True)
        self.originals = [player.twin for player in self.quantized if player.twin]
        self.players = [self.probe_player, *self.originals, *self.quantized]
        for stack, saved in (outputs or {}).items():
            for player in self.players:
                player.finished[stack] = saved[player.key]
        self._trying = False
        self._playing: dict[greenlet, Player] = {}
        self._variants = Variants()
        self._grad = True

    def __enter__(self) -> Self:
        # Grad mode belongs to the thread, which all players share: switched off here, once.
        self._grad = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        for index, block in enumerate(self.blocks):
            block.module.forward = self._gate(index, block.module.forward)
        for player in self.players:
            player.task = greenlet(self._play)
            self._playing[player.task] = player
        return self

    def __exit__(self, *_: object) -> None:
        for player in self.players:
            if player.task:  # running: unwind its frames
                player.task.throw(GreenletExit)
        for block in self.blocks:
            vars(block.module).pop("forward", None)
        self.gatherer.end()
        if self.parking is not None:
            self.parking.close()
        torch.set_grad_enabled(self._grad)

    def present(self, key: str) -> AbstractContextManager[None]:
        """While it is entered, what the player of a key holds can be looked at."""
        if self.parking is None or key == self.probe_player.key:
            return nullcontext()
        return self.parking.present(next(p for p in self.players if p.key == key))

    def outputs(self) -> dict[str, Any]:
        """What the block returned to each player by its key, all standing behind it."""
        return {player.key: player.output for player in self.players}

    def replace_outputs(self, outputs: dict[str, Any]) -> None:
        """Lets the players go on with these outputs instead of their own."""
        for player in self.players:
            player.output = outputs[player.key]

    def _play(self, player: Player) -> None:
        self.model(**arguments(self.model, player.batch.input_ids, player.batch.mask))

    def _advance(self, player: Player, target: int) -> None:
        """Lets a player run until it stops at `target` or beyond."""
        while player.at < target:
            self._resume(player)

    def _resume(self, player: Player) -> None:
        assert player.task is not None
        self._variants.show(original=player.original)
        parking = self.parking if player.number >= 0 else None
        with clock.phase("forward"), widening():
            if parking is not None:
                parking.fetch(player)
            stopped = player.task.switch() if player.task else player.task.switch(player)
            player.at = EXIT if player.task.dead else stopped
            if parking is not None:
                parking.leave(player)

    def _gate(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward with the stops around it."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            player, surveyed = self._current(), False
            if index < self.skip:
                # Finished earlier: all of them return what the last one did, only that one counts.
                return moved(player.finished[self.blocks[index].stack], self.device)
            player.given, player.output = (args, kwargs), None
            stop(ENTER)
            if player.number >= 0 and not self.gatherer.sequential:
                if self.gatherer.counting:
                    original(*args, **kwargs)
                    stop(COUNTED)
                player.output = original(*args, **kwargs)
                surveyed = self._trying
                stop(GATHERED)
                while self._trying:
                    player.trial = original(*args, **kwargs)
                    stop(GATHERED)
            if player.output is None or not (player.original or surveyed):
                player.output = original(*args, **kwargs)
            stop(EXIT)
            output, player.given, player.output = player.output, None, None
            return moved(output, self.device)

        return forward

    def _current(self) -> Player:
        return self._playing[getcurrent()]


class Conductor(Stage):
    """Leads all players through the blocks in lock-step; arguments are those of `Stage`."""

    def enter(self) -> None:
        """Brings every player to the entrance of the next block."""
        self._variants = Variants()
        if self.parking is not None:
            self.parking.look_around()
        for player in self.players:
            self._resume(player)
            if player.at != ENTER:
                raise RunError("the model does not call its blocks one after another, each once")

    def probe(self, block: Block) -> list[Group]:
        """Plays the block with the probe: its groups, in the order in which they are reached.

        Raises:
            RunError: the block calls a linear more than once.
        """
        for experts in block.experts.values():
            experts.visits = partial(visit_all, experts, as_one=self.policy.gather == "all")
        with taking_notes(block) as notes:
            self._advance(self.probe_player, EXIT)
        notes.stream.append((block.name, hidden(self.probe_player.output)))
        return notes.groups()

    def play(
        self,
        block: Block,
        groups: list[Group],
        solve: Callable[[Group], None],
        *,
        sequential: bool,
    ) -> dict[str, list[int]]:
        """Plays the block with all batches and solves its groups.

        Args:
            block: the block all players have entered.
            groups: what `probe` returned.
            solve: replaces the weights of a group's linears; its Hessian is complete.
            sequential: stop at every group, so that each sees already quantized predecessors;
                otherwise gather all Hessians in a first pass, and play the block again. The head
                is played in sequence always, so that there are no logits to keep.

        Returns:
            For each module of experts, how many tokens its router sent to each.
        """
        sequential = sequential or block.is_head
        self.gatherer.begin(block, groups, sequential=sequential, drift=bool(self.originals))
        if not sequential:
            self._gather(groups)
        for index, group in enumerate(groups):
            if sequential:
                self._reach(index, groups)
            self._solve(block, group, solve)
        for player in [*self.originals, *self.quantized]:
            if not block.is_head:  # nobody needs logits
                self._advance(player, EXIT)
            for held in (player.captured, player.streams, player.passing):
                held.clear()
        for routing in self.gatherer.routings:
            routing.join(self.ranks)
        tokens = {routing.name: routing.tokens.tolist() for routing in self.gatherer.routings}
        self.gatherer.end()
        return tokens

    def survey(
        self,
        block: Block,
        groups: list[Group],
        measure: Callable[[Callable[[], list[torch.Tensor]], list[torch.Tensor]], None],
        *,
        tokens: int,
    ) -> None:
        """Plays the block with its own weights, and as often with others as it takes to compare them.

        Args:
            block: the block all players have entered.
            groups: what `probe` returned; their Hessians are complete when `measure` is called.
            measure: called with a function that plays the block with its present weights, and with
                what the block returned with its own; it leaves the weights as they were.
            tokens: of the first batches that are played again, about.
        """
        self.gatherer.begin(block, groups, sequential=False, drift=False)
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
            return [hidden(player.trial) for player in again]

        measure(attempt, [hidden(player.output) for player in again])
        self._trying = False
        for player in self.quantized:
            self._advance(player, EXIT)
            player.trial = None
            player.passing.clear()
        self.gatherer.end()

    def _reach(self, index: int, groups: list[Group]) -> None:
        """Sequential mode: leads all players in front of a group."""
        players = [*self.originals, *self.quantized]
        for routing in self.gatherer.routings:
            if routing.first == index:
                for player in players:
                    self._advance(player, 2 * index)
                routing.decide(groups, self.ranks)
        for player in players:
            self._advance(player, 2 * index + 1)

    def _gather(self, groups: list[Group]) -> None:
        """Block mode: gathers all Hessians, one batch after another."""
        found = self.gatherer.routings
        if found and self.policy.gather == "routed":
            self.gatherer.counting = True
            for player in self.quantized:
                self._advance(player, COUNTED)
            self.gatherer.counting = False
            for routing in found:
                routing.decide(groups, self.ranks)
        for player in self.quantized:
            both = [player.twin, player] if player.twin is not None else [player]
            for place in [*(2 * routing.first for routing in found), GATHERED]:
                for each in both:
                    self._advance(each, place)

    def _solve(self, block: Block, group: Group, solve: Callable[[Group], None]) -> None:
        """Solves a group, and remembers its original weights for the original players."""
        self._variants.show(original=False)
        group.join(self.ranks, self.device)
        linears = [block.linears[name] for name in group.names]
        before: list[Any] = [linear.weight for linear in linears]
        solve(group)
        group.forget()
        if self.originals:
            self._variants.add(linears, before)
