"""What is summed up while a block is played: the inputs of its groups, and how far they have drifted.

Hooks in front of linears and of experts; they run inside the players, and stop them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from roundwise.errors import NumericalError
from roundwise.forward.batch import GATHERED, PausedBatch, stop
from roundwise.forward.expert_tokens import (
    ExpertCalibration,
    ExpertRouting,
    RoutedBatch,
    expert_routings,
)
from roundwise.forward.input_groups import InputGroup, ReferenceActivations
from roundwise.model.blocks import Block, weight_of
from roundwise.model.moe import Visits
from roundwise.system.timer import timer


class CalibrationHooks:
    """Sums up what the players meet in front of the groups of one block.

    Args:
        current: the player that is running.
        held_out, ratio, policy: see `ForwardScheduler`.
    """

    def __init__(
        self,
        current: Callable[[], PausedBatch],
        *,
        held_out: frozenset[int],
        ratio: float | None,
        policy: ExpertCalibration,
    ) -> None:
        self._current, self.held_out, self.ratio, self.policy = current, held_out, ratio, policy
        self.sequential = True
        """Players stop at every group."""
        self.counting = False
        """Nothing is summed up yet: only the tokens of experts are counted."""
        self.expert_routings: list[ExpertRouting] = []
        self._leaders: dict[str, tuple[int, InputGroup]] = {}
        self._experts: dict[str, tuple[ExpertRouting, int]] = {}
        self._hooks: list[Any] = []

    def begin(
        self, block: Block, groups: list[InputGroup], *, sequential: bool, drift: bool
    ) -> None:
        """Puts the hooks into a block; `drift`: the original model is played beside."""
        self.sequential = sequential
        self._leaders = {group.names[0]: (2 * i + 1, group) for i, group in enumerate(groups)}
        self.expert_routings = expert_routings(block, groups, self.policy)
        for routing in self.expert_routings:
            routing.experts.visits = partial(self._visits, routing)
            self._experts |= {n: (routing, expert) for n, expert in routing.expert_of.items()}
        self._hooks = [
            block.linears[name].register_forward_pre_hook(self._hook(name))
            for name in self._leaders
        ]
        if drift:
            self._hooks += self._tap(block, groups)
            self._hooks += [
                block.linears[group.names[0]].register_forward_hook(self._behind(group))
                for group in groups
                if self._by_output(block, group)
            ]

    def end(self) -> None:
        """Takes the hooks out again."""
        for hook in self._hooks:
            hook.remove()
        for routing in self.expert_routings:
            vars(routing.experts).pop("visits", None)
        self._hooks, self._leaders, self._experts, self.expert_routings = [], {}, {}, []

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """In front of a linear: sums up what it is fed with, and stops."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            player = self._current()
            place, group = self._leaders.get(name, (GATHERED, None))
            if self.counting or group is None or place <= player.stopped_at:
                return
            if player.is_reference and group.linear is not None:
                return  # `_behind` keeps its output
            stream = player.residual_inputs.get(group.residual or "")
            x, rows, shared = args[0], *self._rows(player, name)
            if player.is_reference:
                player.reference_activations[name] = ReferenceActivations(
                    stream, x if shared is None else x[shared]
                )
            else:
                mask = _fitting_mask(player.batch.counting, x, rows)
                self._add(player, name, group, x, stream, mask)
            if self.sequential:
                stop(place)

        return hook

    def _by_output(self, block: Block, group: InputGroup) -> bool:
        """Its drift is summed up as it reaches the output: less work unless the linear widens."""
        if group.residual is None or self.ratio is None:
            return False
        linear = block.linears[group.names[0]]
        rows, columns = weight_of(linear).shape
        if rows <= columns:
            group.linear, group.ratio = linear, self.ratio
        return rows <= columns

    def _behind(self, group: InputGroup) -> Callable[..., None]:
        """Behind a linear: keeps what the original model returns, and goes on: nothing waits for it."""

        def hook(_: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> None:
            player = self._current()
            if player.is_reference:
                # Copies, because the model may add to one or the other in place.
                stream = player.residual_inputs[group.residual or ""].clone()
                player.reference_activations[group.names[0]] = ReferenceActivations(
                    stream, y=output.clone()
                )

        return hook

    def _add(
        self,
        player: PausedBatch,
        name: str,
        group: InputGroup,
        x: torch.Tensor,
        stream: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> None:
        captured = (
            player.reference.reference_activations.pop(name, None)
            if player.reference is not None
            else None
        )
        if not x.numel():  # none of this batch's tokens were sent to an expert
            return
        group = group.part(held=player.number in self.held_out)
        try:
            with timer.phase("hessian"):
                group.add(x, mask)
        except NumericalError as error:
            raise NumericalError(f"{name}, calibration batch {player.number}: {error}") from None
        if captured is not None:
            with timer.phase("drift"):
                group.add_drift(x, captured, stream, mask)

    def _visits(self, routing: ExpertRouting, x: torch.Tensor, index: torch.Tensor) -> Visits:
        """In front of experts: decides which tokens of the current player pass which."""
        player = self._current()
        if player.stopped_at >= GATHERED:
            return routing.experts.routed(x, index)
        if not player.is_reference and routing.name not in player.expert_tokens:
            routing.count(index, player.batch.counting)
        passing = player.expert_tokens[routing.name] = RoutedBatch(index)
        if self.counting:
            return routing.experts.routed(x, index)
        reference = None
        if self.policy.gather == "routed":
            stop(2 * routing.first)  # until it is known what all batches, and the twin, chose
            if player.is_reference and player.reference is not None:
                reference = player.reference.expert_tokens[routing.name]
        routing.send(passing, reference)
        return passing.visits()

    def _rows(
        self, player: PausedBatch, name: str
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of an expert's linear: `RoutedBatch.rows` and `RoutedBatch.shared`; None: all tokens."""
        if name not in self._experts:
            return None, None
        routing, expert = self._experts[name]
        passing = player.expert_tokens[routing.name]
        return passing.rows[expert], passing.shared[expert]

    def _tap(self, block: Block, groups: list[InputGroup]) -> list[Any]:
        """Hooks that keep the residual stream where a group adds to it."""

        def tap(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                self._current().residual_inputs[name] = args[0]

            return hook

        names = {group.residual for group in groups if group.residual}
        return [
            block.module.get_submodule(
                name.removeprefix(f"{block.name}.")
            ).register_forward_pre_hook(tap(name))
            for name in sorted(names)
        ]


def _fitting_mask(
    mask: torch.Tensor | None, x: torch.Tensor, rows: torch.Tensor | None
) -> torch.Tensor | None:
    """Which tokens count of `x` [..., in], which has a row per token, or for each of `rows`."""
    if mask is None:
        return None
    if rows is not None:
        return mask.reshape(-1)[rows]
    if x.numel() // x.shape[-1] != mask.numel():
        raise NumericalError(
            "padding, or tokens that do not count, cannot be told in a layer that sees only some"
        )
    return mask
