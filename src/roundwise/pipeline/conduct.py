"""The paused forward: the model's own forward runs, we only stop it in front of groups of linears.

Each calibration batch is a *player*: a greenlet that runs `model(input_ids, use_cache=False)` exactly
as transformers wrote it. Hooks hand control back to the conductor; only one player runs at a time,
all on one thread. A player stops

    ENTER      in front of a block, before it needs the block's weights
    0, 1, …    in front of the first linear of each group that shares an input (sequential mode)
    GATHERED   after a first pass through the block that only gathered Hessians (block mode)
    EXIT       behind the block, with its output

so the conductor always knows that every batch has reached the same place. The first player is a
probe of a few tokens: it finds out which linears read the same input and in which order.

Knows hooks and Hessians; nothing of files, solving, or formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from roundwise.core.hessian import Hessian
from roundwise.errors import NumericalError, RunError
from roundwise.models.skeleton import Block
from roundwise.pipeline.calibration import Batch

ENTER, GATHERED, EXIT = -1, 1 << 20, 1 << 21
#: Tokens of the probe: enough for any local attention pattern to be well formed.
PROBE_TOKENS = 8


@dataclass
class Group:
    """Linears of one block that read the same input."""

    names: list[str]
    hessian: Hessian | None = None
    """Set when the first batch gets here; still None when none did."""


@dataclass
class Player:
    """One batch on its way through the model."""

    batch: Batch
    number: int
    """Place among the batches; -1 is the probe."""
    task: greenlet | None = None
    at: int = EXIT
    output: Any = None
    """What the block returned, while the player stands behind it."""


class Conductor:
    """Leads all players through the blocks in lock-step; use as a context manager.

    Args:
        model: its parameters outside the blocks are loaded; those of a block are when it is played.
        blocks: the repeated blocks, in the order in which the model calls them.
        batches: calibration batches.
        skip: resuming, the number of finished blocks; they are not played.
        outputs: resuming, what the last finished block returned to each player, the probe first.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        batches: list[Batch],
        *,
        skip: int = 0,
        outputs: list[Any] | None = None,
    ) -> None:
        self.model, self.blocks, self.skip = model, blocks, skip
        probe = Batch(batches[0].input_ids[:1, :PROBE_TOKENS], None)
        self.players = [Player(batch, i - 1) for i, batch in enumerate([probe, *batches])]
        for player, output in zip(self.players, outputs or [], strict=bool(outputs)):
            player.output = output
        self._leaders: dict[str, tuple[int, Group]] = {}
        self._sequential = True
        self._calls: list[tuple[str, torch.Tensor]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Conductor:
        for index, block in enumerate(self.blocks):
            block.module.forward = self._gate(index, block.module.forward)
            for name, linear in block.linears.items():
                self._hooks.append(linear.register_forward_pre_hook(self._hook(name)))
        for player in self.players:
            player.task = greenlet(self._play)
        return self

    def __exit__(self, *_: object) -> None:
        for player in self.players:
            if player.task:  # running: unwind its frames
                player.task.throw(GreenletExit)
        for block in self.blocks:
            vars(block.module).pop("forward", None)
        for hook in self._hooks:
            hook.remove()

    def enter(self) -> None:
        """Brings every player to the entrance of the next block."""
        for player in self.players:
            self._resume(player)
            if player.at != ENTER:
                raise RunError("the model does not call its blocks one after another, each once")

    def probe(self) -> list[Group]:
        """Plays the block with the probe: its groups, in the order in which they are reached.

        Raises:
            RunError: the block calls a linear more than once.
        """
        self._calls = []
        self._advance(self.players[0], EXIT)
        # Same memory, size and version: the same values, also when seen through another view.
        groups: dict[tuple[int, int, int], Group] = {}
        for name, x in self._calls:
            groups.setdefault((x.data_ptr(), x.numel(), x._version), Group([])).names.append(name)
        names = [name for name, _ in self._calls]
        self._calls = []
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise RunError(
                f"{twice} is called more than once in its block; leave it out with --skip"
            )
        return list(groups.values())

    def play(
        self, groups: list[Group], solve: Callable[[Group], None], *, sequential: bool
    ) -> None:
        """Plays the block with all batches and solves its groups.

        Args:
            groups: what `probe` returned.
            solve: replaces the weights of a group's linears; its Hessian is complete.
            sequential: stop at every group, so that each sees already quantized predecessors;
                otherwise gather all Hessians in a first pass, and play the block again.
        """
        self._sequential = sequential
        self._leaders = {group.names[0]: (i, group) for i, group in enumerate(groups)}
        for index, group in enumerate(groups):
            for player in self.players[1:]:
                self._advance(player, index if sequential else GATHERED)
            solve(group)
            group.hessian = None
        self._leaders = {}
        for player in self.players[1:]:
            self._advance(player, EXIT)

    def outputs(self) -> list[Any]:
        """What the block returned to each player, all standing behind it; the probe's first."""
        return [player.output for player in self.players]

    def replace_outputs(self, outputs: list[Any]) -> None:
        """Lets the players go on with these outputs instead of their own."""
        for player, output in zip(self.players, outputs, strict=True):
            player.output = output

    def _play(self, player: Player) -> None:
        with torch.no_grad():
            self.model(**player.batch.inputs(), use_cache=False)

    def _advance(self, player: Player, target: int) -> None:
        """Lets a player run until it stops at `target` or beyond."""
        while player.at < target:
            self._resume(player)

    def _resume(self, player: Player) -> None:
        assert player.task is not None
        stopped = player.task.switch() if player.task else player.task.switch(player)
        player.at = EXIT if player.task.dead else stopped

    def _gate(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward with the stops around it."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            player = self._current()
            if index < self.skip:
                # Finished earlier: all of them return what the last one did, only that one counts.
                return player.output
            player.output = None
            stop(ENTER)
            if player.number >= 0 and not self._sequential:
                original(*args, **kwargs)
                stop(GATHERED)
            player.output = original(*args, **kwargs)
            stop(EXIT)
            output, player.output = player.output, None
            return output

        return forward

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """In front of a linear: the probe takes notes, the others add to the Hessian and stop."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            player = self._current()
            if player.number < 0:
                self._calls.append((name, args[0]))
                return
            index, group = self._leaders.get(name, (GATHERED, None))
            if group is None or index <= player.at:
                return
            if group.hessian is None:
                group.hessian = Hessian(args[0].shape[-1])
            try:
                group.hessian.add(args[0], _fitting_mask(player.batch.mask, args[0]))
            except NumericalError as error:
                raise NumericalError(
                    f"{name}, calibration batch {player.number}: {error}"
                ) from None
            if self._sequential:
                stop(index)

        return hook

    def _current(self) -> Player:
        task = getcurrent()
        return next(player for player in self.players if player.task is task)


def stop(place: int) -> None:
    """Hands control from a player back to the conductor."""
    parent = getcurrent().parent
    assert parent is not None
    parent.switch(place)


def _fitting_mask(mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """The padding mask, if `x` [..., in] has one row per token of the batch."""
    if mask is None:
        return None
    if x.numel() // x.shape[-1] != mask.numel():
        raise NumericalError("padded batches cannot pass a layer that sees only some of the tokens")
    return mask
