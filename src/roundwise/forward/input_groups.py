"""InputGroup: linear layers that read the same input, found by one small forward, and their sums.

Nothing is known about the architecture: which linears share an input, and which add to the residual
stream, is read off the tensors that pass while the probe runs through a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from roundwise.core.drift import Drift, Moments
from roundwise.core.hessian import CrossMoment, Hessian
from roundwise.errors import RunError
from roundwise.model.blocks import Block, weight_of
from roundwise.system.distributed import Ranks
from roundwise.system.timer import timer

#: Reason that is recorded for a layer without drift.
OTHER_TOKENS = (
    "its input's drift is not corrected: the quantized model sends other tokens here than the "
    "original"
)


@dataclass
class ReferenceActivations:
    """Activations of the original model at a group: the residual stream, and input or output."""

    stream: torch.Tensor | None
    """Residual stream [..., hidden] that the group adds to; None: it adds to none."""
    x: torch.Tensor | None = None
    """Input [..., in]; None where the output is enough."""
    y: torch.Tensor | None = None
    """Output [..., out] of `InputGroup.linear`."""

    def fits(self, x: torch.Tensor, stream: torch.Tensor | None) -> bool:
        """Tells whether the activations are of as many tokens as those of the quantized model.

        Args:
            x: input [..., in] in the quantized model.
            stream: residual stream [..., hidden] in the quantized model.
        """
        pairs = ((self.x, x), (self.y, x), (self.stream, stream))
        return all(
            kept is None or now is None or kept.shape[:-1] == now.shape[:-1] for kept, now in pairs
        )


@dataclass
class InputGroup:
    """Linears of one block that read the same input, and the sums over that input."""

    names: list[str]
    """Full module names, in the order in which they are called."""
    hessian: Hessian | None = None
    """Sum of XᵀX; None until a token gets here."""
    residual: str | None = None
    """Module whose input is the residual stream that the group's one linear adds to."""
    input_drift: CrossMoment | None = None
    residual_drift: CrossMoment | None = None
    linear: nn.Module | None = None
    """The group's one linear, where `residual_drift` also holds the original model's output X̃Wᵀ."""
    ratio: float = 1.0
    """Factor of X̃Wᵀ in `residual_drift`: α/β."""
    held: InputGroup | None = None
    """Sums over the batches that are held out."""
    sees_other_tokens: bool = False
    """The original model sends other tokens here than the quantized one, so there is no drift."""
    fallback: str | None = None
    """Reason why the sums are not those of the tokens that the model sends here; None: they are."""

    def part(self, *, held: bool) -> InputGroup:
        """The sums that a batch belongs to: its own, or those that are held out."""
        if not held:
            return self
        if self.held is None:
            self.held = self._new_part()
        return self.held

    def add(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Adds a batch of inputs `x` [..., in] to the Hessian; False in `mask` marks padding.

        Raises:
            NumericalError: see `Hessian.add`.
        """
        if self.hessian is None:
            self.hessian = Hessian(x.shape[-1], device=x.device)
        self.hessian.add(x, mask)

    def add_drift(
        self,
        x: torch.Tensor,
        original: ReferenceActivations,
        stream: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> None:
        """Adds a batch's distance from the original model to the drift sums.

        Args:
            x: input [..., in] in the quantized model.
            original: the same batch in the original model.
            stream: residual stream [..., hidden] that the group's linear adds to.
            mask: bool, False marks padding.
        """
        width = x.shape[-1]
        if stream is not None and original.stream is not None:
            if self.residual_drift is None:
                self.residual_drift = CrossMoment(stream.shape[-1], width, device=x.device)
            output = self._scaled_output(original)
            self.residual_drift.add(original.stream, stream, x, mask, output)
        if original.x is not None:
            if self.input_drift is None:
                self.input_drift = CrossMoment(width, width, device=x.device)
            self.input_drift.add(original.x, x, x, mask)

    def _scaled_output(self, original: ReferenceActivations) -> torch.Tensor | None:
        """X̃Wᵀ α/β, without the linear's bias; None where it is not summed up."""
        if self.linear is None or original.y is None:
            return None
        bias = self.linear.bias
        y = original.y - bias if isinstance(bias, torch.Tensor) else original.y
        return y if self.ratio == 1.0 else y * self.ratio

    def _new_part(self) -> InputGroup:
        return InputGroup(self.names, residual=self.residual, linear=self.linear, ratio=self.ratio)

    def all_reduce(self, ranks: Ranks, device: torch.device) -> None:
        """Makes the sums those over all ranks, some of which may have seen no token.

        Args:
            ranks: the processes of the run.
            device: where sums are made that this rank does not have yet.
        """
        if ranks.is_single:
            return
        for name, make in (
            ("hessian", lambda rows, _: Hessian(rows, device=device)),
            ("input_drift", partial(CrossMoment, device=device)),
            ("residual_drift", partial(CrossMoment, device=device)),
        ):
            mine = getattr(self, name)
            rows, columns = ranks.all_reduce_max(*(mine.sum.shape if mine else (0, 0)))
            if rows:
                mine = mine or make(rows, columns)
                setattr(self, name, mine)
                ranks.all_reduce_sum(mine.sum)
                mine.tokens = int(ranks.all_reduce_sum(torch.tensor([mine.tokens])))
        if any(ranks.all_reduce_max(self.held is not None)):
            self.held = self.held or self._new_part()
            self.held.all_reduce(ranks, device)

    def drop_unmatched_drift(self, ranks: Ranks) -> None:
        """Drops the drift if, on any rank, the two models sent different tokens to the group."""
        mine = self.sees_other_tokens
        if not (mine if ranks.is_single else any(ranks.all_reduce_max(int(mine)))):
            return
        self.fallback = self.fallback or OTHER_TOKENS
        for part in (self, self.held):
            if part is not None:
                part.input_drift = part.residual_drift = part.linear = None

    def take_moments(self) -> Moments | None:
        """Turns the sums into means over tokens, in place, and gives them up; None: no token was seen.

        Call it before the group's linears get new weights: the drift is completed with W.
        """
        hessian, self.hessian = self.hessian, None
        if hessian is None:
            return None
        H = hessian.take_mean()
        with timer.phase("drift"):
            moments = (self.input_drift, self.residual_drift)
            drift = Drift(*(moment.take_mean() if moment else None for moment in moments))
            if self.linear is not None:
                drift.subtract_output(weight_of(self.linear), H, self.ratio)
        self.input_drift = self.residual_drift = None
        return Moments(H, drift, hessian.tokens)

    def clear(self) -> None:
        """Drops all sums and frees their memory."""
        self.hessian = self.input_drift = self.residual_drift = None
        self.held = self.linear = None


@dataclass
class BlockTrace:
    """Tensors that passed through a block while the probe ran, in order of time."""

    inputs: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    """(linear, its input)."""
    outputs: list[tuple[str, torch.Tensor, int]] = field(default_factory=list)
    """(linear, its output, length of `stream` at that time)."""
    stream: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    """(module, its input) for every module of the block; last, the block's output."""

    def groups(self) -> list[InputGroup]:
        """The groups, in the order in which they are reached.

        Raises:
            RunError: a linear is called more than once.
        """
        names = [name for name, _ in self.inputs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise RunError(
                f"{twice} is called more than once in its block; leave it out with --skip"
            )
        # Same memory, size and version: the same values, also when seen through another view.
        groups: dict[tuple[int, int, int], InputGroup] = {}
        for name, x in self.inputs:
            key = (x.data_ptr(), x.numel(), x._version)
            groups.setdefault(key, InputGroup([])).names.append(name)
        outputs = {name: (y, seen) for name, y, seen in self.outputs}
        for group in groups.values():
            if len(group.names) == 1 and group.names[0] in outputs:
                group.residual = self._added_to(*outputs[group.names[0]])
        return list(groups.values())

    def _added_to(self, y: torch.Tensor, seen: int) -> str | None:
        """The module whose input r gave r + y, exactly, something that passed after y."""
        for module, r in self.stream[:seen]:
            if r.numel() == y.numel() and r.shape[-1] == y.shape[-1]:
                total = (r.reshape(y.shape) + y).reshape(-1)
                later = (z.reshape(-1) for _, z in self.stream[seen:] if z.numel() == y.numel())
                if any(torch.equal(total, z) for z in later):
                    return module
        return None


@contextmanager
def trace_block(block: Block) -> Iterator[BlockTrace]:
    """Context manager: records the tensors that pass through a block, with hooks on all its modules."""
    trace = BlockTrace()
    handles: list[Any] = []

    def before(name: str, *, linear: bool, stream: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor):
                if stream:
                    trace.stream.append((name, args[0]))
                if linear:
                    trace.inputs.append((name, args[0]))

        return hook

    def after(name: str) -> Any:
        def hook(_: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> None:
            trace.outputs.append((name, output, len(trace.stream)))

        return hook

    experts = tuple(f"{path}." for path in block.experts)
    for path, module in block.modules():
        # The stream does not pass inside experts, and no expert's output alone is added to it.
        outside, linear = not path.startswith(experts), path in block.linears
        handles.append(
            module.register_forward_pre_hook(before(path, linear=linear, stream=outside))
        )
        if linear and outside:
            handles.append(module.register_forward_hook(after(path)))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
