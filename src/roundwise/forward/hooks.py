"""CalibrationHooks: sums up the inputs of linear layers, and their drift, while a block runs.

The hooks stand in front of linears and of experts. They run inside the greenlets of the batches, and
stop them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from roundwise.errors import NumericalError
from roundwise.forward.batch import GATHERED, PausedBatch, Stop, at_experts, at_group, pause
from roundwise.forward.expert_tokens import (
    ExpertCalibration,
    ExpertRouting,
    RoutedBatch,
    expert_routings,
)
from roundwise.forward.input_groups import InputGroup, ReferenceActivations
from roundwise.model.blocks import Block, weight_of
from roundwise.model.moe import ExpertDispatch
from roundwise.system.timer import timer

OutsideModel = Callable[[], AbstractContextManager[None]]


class CalibrationHooks:
    """The hooks in the linears of one block, and what they sum up for its groups.

    Args:
        current: returns the batch that is running.
        outside: context manager around code that runs inside the model's forward but is not the
            model's, and around every pause; see `system.half_matmul.outside_model`.
        held_out, ratio, policy: see `ForwardScheduler`.
    """

    def __init__(
        self,
        current: Callable[[], PausedBatch],
        outside: OutsideModel,
        *,
        held_out: frozenset[int],
        ratio: float | None,
        policy: ExpertCalibration,
    ) -> None:
        self._current, self._outside, self.held_out, self.ratio, self.policy = (
            current,
            outside,
            held_out,
            ratio,
            policy,
        )
        self.sequential = True
        """Batches stop in front of every group."""
        self.counting = False
        """Only the tokens of experts are counted; nothing is summed up yet."""
        self.routings: list[ExpertRouting] = []
        """The modules of experts in the block, in the order in which they are reached."""
        self._leaders: dict[str, tuple[Stop, InputGroup]] = {}
        self._experts: dict[str, tuple[ExpertRouting, int]] = {}
        self._handles: list[Any] = []

    def install(
        self, block: Block, groups: list[InputGroup], *, sequential: bool, drift: bool
    ) -> None:
        """Registers the hooks of a block.

        Args:
            block: the block.
            groups: its groups, in the order in which they are reached.
            sequential: stop in front of every group.
            drift: batches run through the original model too, whose activations are compared.
        """
        self.sequential = sequential
        self._leaders = {group.names[0]: (at_group(i), group) for i, group in enumerate(groups)}
        self.routings = expert_routings(block, groups, self.policy)
        for routing in self.routings:
            routing.experts.dispatch = partial(self._dispatch, routing)
            self._experts |= {n: (routing, expert) for n, expert in routing.expert_of.items()}
        self._handles = [
            block.linears[name].register_forward_pre_hook(self._before_linear(name))
            for name in self._leaders
        ]
        if drift:
            self._handles += self._keep_residuals(block, groups)
            self._handles += [
                block.linears[group.names[0]].register_forward_hook(self._after_linear(group))
                for group in groups
                if self._compares_outputs(block, group)
            ]

    def remove(self) -> None:
        """Removes all hooks."""
        for handle in self._handles:
            handle.remove()
        for routing in self.routings:
            vars(routing.experts).pop("dispatch", None)
        self._handles, self._leaders, self._experts, self.routings = [], {}, {}, []

    def _before_linear(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """Forward pre-hook: sums up the linear's input, and stops."""
        stop, group = self._leaders[name]

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            batch = self._current()
            if self.counting or stop <= batch.stopped_at:
                return
            if batch.is_reference and group.linear is not None:
                return  # `_after_linear` keeps its output
            with self._outside():
                stream = batch.residual_inputs.get(group.residual or "")
                x, rows, shared = args[0], *self._rows(batch, name)
                if batch.is_reference:
                    x = x if shared is None else x[shared]
                    batch.reference_activations[name] = ReferenceActivations(stream, x)
                else:
                    self._add(batch, group, x, stream, _matching_mask(batch.counting, x, rows))
                if self.sequential:
                    pause(stop)

        return hook

    def _after_linear(self, group: InputGroup) -> Callable[..., None]:
        """Forward hook: stores the reference model's output and does not pause."""

        def hook(_: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> None:
            batch = self._current()
            if batch.is_reference:
                with self._outside():
                    # Copies, because the model may add to one or the other in place.
                    stream = batch.residual_inputs[group.residual or ""].clone()
                    kept = ReferenceActivations(stream, y=output.clone())
                    batch.reference_activations[group.names[0]] = kept

        return hook

    def _compares_outputs(self, block: Block, group: InputGroup) -> bool:
        """Decides whether a group's drift is summed up as it reaches the output, and marks the group.

        That is less work unless the linear has more outputs than inputs.
        """
        if group.residual is None or self.ratio is None:
            return False
        linear = block.linears[group.names[0]]
        rows, columns = weight_of(linear).shape
        if rows <= columns:
            group.linear, group.ratio = linear, self.ratio
        return rows <= columns

    def _add(
        self,
        batch: PausedBatch,
        group: InputGroup,
        x: torch.Tensor,
        stream: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> None:
        """Adds a batch's input, and its drift from the reference, to the sums of a group."""
        name, kept = group.names[0], None
        if batch.reference is not None:
            kept = batch.reference.reference_activations.pop(name, None)
        if not x.numel():  # none of this batch's tokens were sent to an expert
            return
        part = group.part(held=batch.number in self.held_out)
        try:
            with timer.phase("hessian"):
                part.add(x, mask)
        except NumericalError as error:
            raise NumericalError(f"{name}, calibration batch {batch.number}: {error}") from None
        if batch.reference is not None and (kept is None or not kept.fits(x, stream)):
            group.sees_other_tokens = True
        elif kept is not None:
            with timer.phase("drift"):
                part.add_drift(x, kept, stream, mask)

    def _dispatch(
        self, routing: ExpertRouting, x: torch.Tensor, index: torch.Tensor
    ) -> ExpertDispatch:
        """In front of experts: decides which tokens of the current batch pass which expert."""
        batch = self._current()
        with self._outside():
            if batch.stopped_at >= GATHERED:
                return routing.experts.dispatch_by_router(x, index)
            if not batch.is_reference and routing.name not in batch.expert_tokens:
                routing.count(index, batch.counting)
            routed = batch.expert_tokens[routing.name] = RoutedBatch(index)
            if self.counting:
                return routing.experts.dispatch_by_router(x, index)
            quantized = None
            if self.policy.gather == "routed":
                # Until it is known what the routers of all batches, and of the other model, chose.
                pause(at_experts(routing.first))
                if batch.is_reference and batch.reference is not None:
                    quantized = batch.reference.expert_tokens[routing.name]
            routing.assign(routed, quantized)
            return routed.dispatch()

    def _rows(
        self, batch: PausedBatch, name: str
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`RoutedBatch.rows` and `RoutedBatch.shared` of an expert's linear; None, None: all tokens."""
        if name not in self._experts:
            return None, None
        routing, expert = self._experts[name]
        routed = batch.expert_tokens[routing.name]
        return routed.rows[expert], routed.shared[expert]

    def _keep_residuals(self, block: Block, groups: list[InputGroup]) -> list[Any]:
        """Pre-hooks that keep the residual stream where a group adds to it."""

        def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                self._current().residual_inputs[name] = args[0]

            return hook

        names = {group.residual for group in groups if group.residual}
        return [
            block.module.get_submodule(
                name.removeprefix(f"{block.name}.")
            ).register_forward_pre_hook(keep(name))
            for name in sorted(names)
        ]


def _matching_mask(
    mask: torch.Tensor | None, x: torch.Tensor, rows: torch.Tensor | None
) -> torch.Tensor | None:
    """The tokens of `x` [..., in] that count.

    Args:
        mask: bool, of all tokens of the batch; None: all count.
        x: has a row for each token, or for each of `rows`.
        rows: numbers of the tokens that an expert is given; None: all.

    Raises:
        NumericalError: the tokens of `x` are not those of the batch.
    """
    if mask is None:
        return None
    if rows is not None:
        return mask.reshape(-1)[rows]
    if x.numel() // x.shape[-1] != mask.numel():
        raise NumericalError(
            "the layer sees only some of the tokens, so padding cannot be told from text there: use "
            "windows of one length (--batch-size 1 needs no padding)"
        )
    return mask
