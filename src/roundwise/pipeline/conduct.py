"""The paused forward: the model's own forward runs, we only stop it in front of groups of linears.

The conductor leads all players (`stage.py`) from one stop to the next, so it knows that every batch
has reached the same place. The first player is a probe of a few tokens: it finds out which linears read
the same input and in which order. With a reference, each batch has a *twin* that plays the original
weights in lock-step: what it meets in front of a group tells how far the quantized model has drifted.

Knows hooks and what they sum up; nothing of files, solving, or formats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from roundwise.errors import RunError
from roundwise.models.blocks import Block
from roundwise.pipeline.players import COUNTED, ENTER, EXIT, GATHERED, Variants, hidden
from roundwise.pipeline.probe import Group, taking_notes
from roundwise.pipeline.stage import Stage


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
            experts.visits = lambda x, _, experts=experts: self.policy.everyone(experts, x)
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
