"""The paused forward: the model's own forward runs, we only stop it in front of groups of linears.

Each calibration batch is a *player*: a greenlet that runs `model(input_ids, use_cache=False)` just as
transformers wrote it. Hooks hand control back to the conductor; only one player runs at a time, all on
one thread. A player stops

    ENTER      in front of a block, before it needs the block's weights
    0, 1, …    in front of the first linear of each group that shares an input (sequential mode)
    GATHERED   after a first pass through the block that only gathered Hessians (block mode)
    EXIT       behind the block, with its output

so the conductor always knows that every batch has reached the same place. The first player is a
probe of a few tokens: it finds out which linears read the same input and in which order. With a
reference, each batch has a *twin* that plays the original weights in lock-step: what it meets in front
of a group tells how far the quantized model has drifted.

Knows hooks and what they sum up; nothing of files, solving, or formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from roundwise.core.clock import clock
from roundwise.errors import NumericalError, RunError
from roundwise.models.skeleton import Block, weight_of
from roundwise.pipeline.calibration import Batch
from roundwise.pipeline.probe import Captured, Group, taking_notes

ENTER, GATHERED, EXIT = -1, 1 << 20, 1 << 21
#: Tokens of the probe: enough for any local attention pattern to be well formed.
PROBE_TOKENS = 8


@dataclass
class Player:
    """One batch on its way through the model."""

    batch: Batch
    number: int
    """Place among the batches; -1 is the probe."""
    twin: Player | None = None
    """The player of the same batch in the original model."""
    original: bool = False
    """Plays the original weights."""
    task: greenlet | None = None
    at: int = EXIT
    output: Any = None
    """What the block returned, while the player stands behind it."""
    captured: dict[str, Captured] = field(default_factory=dict)
    """Of an original player: what it met in front of each group that its twin has yet to reach."""
    streams: dict[str, torch.Tensor] = field(default_factory=dict)
    """Inputs of the modules that see the residual stream."""


class Conductor:
    """Leads all players through the blocks in lock-step; use as a context manager.

    Args:
        model: its parameters outside the blocks are loaded; those of a block are when it is played.
        blocks: the repeated blocks, in the order in which the model calls them.
        batches: calibration batches.
        reference: also play the original model.
        skip: resuming, the number of finished blocks; they are not played.
        outputs: resuming, what the last finished block returned to each player.
        held_out: numbers of the batches that are summed up apart (`Group.held`).
        ratio: see `Group.add_drift`.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        batches: list[Batch],
        *,
        reference: bool = False,
        skip: int = 0,
        outputs: list[Any] | None = None,
        held_out: frozenset[int] = frozenset(),
        ratio: float | None = None,
    ) -> None:
        self.model, self.blocks, self.skip, self.held_out = model, blocks, skip, held_out
        self.ratio = ratio
        self._linears = {name: linear for b in blocks for name, linear in b.linears.items()}
        probe = Batch(batches[0].input_ids[:1, :PROBE_TOKENS], None)
        self.probe_player = Player(probe, -1)
        self.quantized = [Player(batch, i) for i, batch in enumerate(batches)]
        if reference:
            for player in self.quantized:
                player.twin = Player(player.batch, player.number, original=True)
        self.originals = [player.twin for player in self.quantized if player.twin]
        self.players = [self.probe_player, *self.originals, *self.quantized]
        for player, output in zip(self.players, outputs or [], strict=bool(outputs)):
            player.output = output
        self._leaders: dict[str, tuple[int, Group]] = {}
        self._sequential = True
        self._variants: list[tuple[nn.Module, Any, Any]] = []
        self._showing_original = False
        self._grad = True
        self._hooks: list[Any] = []

    def __enter__(self) -> Conductor:
        # Grad mode belongs to the thread, which all players share: switched off here, once.
        self._grad = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
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
        torch.set_grad_enabled(self._grad)

    def enter(self) -> None:
        """Brings every player to the entrance of the next block."""
        self._variants = []
        for player in self.players:
            self._resume(player)
            if player.at != ENTER:
                raise RunError("the model does not call its blocks one after another, each once")

    def probe(self, block: Block) -> list[Group]:
        """Plays the block with the probe: its groups, in the order in which they are reached.

        Raises:
            RunError: the block calls a linear more than once.
        """
        with taking_notes(block) as notes:
            self._advance(self.probe_player, EXIT)
        output = self.probe_player.output
        result = output[0] if isinstance(output, tuple) else output
        notes.stream.append((block.name, result))
        return notes.groups()

    def play(
        self,
        block: Block,
        groups: list[Group],
        solve: Callable[[Group], None],
        *,
        sequential: bool,
    ) -> None:
        """Plays the block with all batches and solves its groups.

        Args:
            block: the block all players have entered.
            groups: what `probe` returned.
            solve: replaces the weights of a group's linears; its Hessian is complete.
            sequential: stop at every group, so that each sees already quantized predecessors;
                otherwise gather all Hessians in a first pass, and play the block again.
        """
        self._sequential = sequential
        self._leaders = {group.names[0]: (i, group) for i, group in enumerate(groups)}
        taps = self._tap(block, groups) if self.originals else []
        if not sequential:
            for player in self.quantized:
                if player.twin is not None:
                    self._advance(player.twin, GATHERED)
                self._advance(player, GATHERED)
        for index, group in enumerate(groups):
            if sequential:
                for player in [*self.originals, *self.quantized]:
                    self._advance(player, index)
            self._solve(block, group, solve)
        self._leaders = {}
        for hook in taps:
            hook.remove()
        for player in [*self.originals, *self.quantized]:
            self._advance(player, EXIT)
            player.captured.clear()
            player.streams.clear()

    def outputs(self) -> list[Any]:
        """What the block returned to each player, all standing behind it."""
        return [player.output for player in self.players]

    def replace_outputs(self, outputs: list[Any]) -> None:
        """Lets the players go on with these outputs instead of their own."""
        for player, output in zip(self.players, outputs, strict=True):
            player.output = output

    def _solve(self, block: Block, group: Group, solve: Callable[[Group], None]) -> None:
        """Solves a group, and remembers its original weights for the original players."""
        self._show(original=False)
        linears = [block.linears[name] for name in group.names]
        before: list[Any] = [linear.weight for linear in linears]
        solve(group)
        group.forget()
        if self.originals:
            for linear, weight in zip(linears, before, strict=True):
                self._variants.append((linear, weight, linear.weight))

    def _show(self, *, original: bool) -> None:
        """Gives the block's solved linears their original or their quantized weights."""
        if original != self._showing_original:
            for linear, before, after in self._variants:
                linear.weight = before if original else after
            self._showing_original = original

    def _play(self, player: Player) -> None:
        self.model(**player.batch.inputs(), use_cache=False)

    def _advance(self, player: Player, target: int) -> None:
        """Lets a player run until it stops at `target` or beyond."""
        while player.at < target:
            self._resume(player)

    def _resume(self, player: Player) -> None:
        assert player.task is not None
        self._show(original=player.original)
        with clock.phase("forward"):
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
                player.output = original(*args, **kwargs)
                stop(GATHERED)
            if player.output is None or not player.original:
                player.output = original(*args, **kwargs)
            stop(EXIT)
            output, player.output = player.output, None
            return output

        return forward

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """In front of a linear: sums up what it is fed with, and stops."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            player = self._current()
            index, group = self._leaders.get(name, (GATHERED, None))
            if player.number < 0 or group is None or index <= player.at:
                return
            stream = player.streams.get(group.residual or "")
            if player.original:
                player.captured[name] = Captured(args[0], stream)
            else:
                self._add(player, name, group, args[0], stream)
            if self._sequential:
                stop(index)

        return hook

    def _add(
        self, player: Player, name: str, group: Group, x: torch.Tensor, stream: torch.Tensor | None
    ) -> None:
        mask = _fitting_mask(player.batch.mask, x)
        group = group.part(held=player.number in self.held_out)
        try:
            with clock.phase("hessian"):
                group.add(x, mask)
        except NumericalError as error:
            raise NumericalError(f"{name}, calibration batch {player.number}: {error}") from None
        if player.twin is not None and name in player.twin.captured:
            with clock.phase("drift"):
                W = weight_of(self._linears[name]) if len(group.names) == 1 else None
                captured = player.twin.captured.pop(name)
                group.add_drift(x, captured, stream, mask, W=W, ratio=self.ratio)

    def _tap(self, block: Block, groups: list[Group]) -> list[Any]:
        """Hooks that keep the residual stream where a group adds to it."""

        def tap(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                self._current().streams[name] = args[0]

            return hook

        names = {group.residual for group in groups if group.residual}
        return [
            block.module.get_submodule(
                name.removeprefix(f"{block.name}.")
            ).register_forward_pre_hook(tap(name))
            for name in sorted(names)
        ]

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
