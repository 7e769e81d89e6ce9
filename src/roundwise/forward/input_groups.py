"""What one small forward tells about a block: which linears share an input, which add to the stream.

Nothing is known about the architecture; everything is read off the tensors that pass by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from roundwise.core.drift import Drift
from roundwise.core.hessian import CrossMoment, Hessian
from roundwise.errors import RunError
from roundwise.model.blocks import Block, weight_of
from roundwise.system.distributed import Ranks


class BatchObserver(Protocol):
    """Sees each batch of a group's input right after it was summed up."""

    def add(self, x: torch.Tensor, mask: torch.Tensor | None, hessian: Hessian) -> None:
        """Called with the batch `x` [..., in], its mask and the sums that it is in."""


@dataclass
class InputGroup:
    """Linears of one block that read the same input, and what is summed up about it."""

    names: list[str]
    hessian: Hessian | None = None
    """Set when the first batch gets here; still None when none did."""
    residual: str | None = None
    """Module whose input is the residual stream that the group's one linear adds to."""
    input_drift: CrossMoment | None = None
    residual_drift: CrossMoment | None = None
    linear: nn.Module | None = None
    """Its one linear, where `residual_drift` holds the original model's output X̃Wᵀ of it as well."""
    ratio: float = 1.0
    """How much of X̃Wᵀ: α/β."""
    held: InputGroup | None = None
    """The sums over batches that are held out."""
    watch: BatchObserver | None = None
    """Sees each batch that is summed up."""
    fallback: str | None = None
    """Why its sums are not those of the tokens that pass in the model."""

    def part(self, *, held: bool) -> InputGroup:
        """What a batch is summed up in."""
        if held and self.held is None:
            self.held = self._alike()
        return self.held if held and self.held else self

    def add(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Adds a batch of inputs to the Hessian."""
        if self.hessian is None:
            self.hessian = Hessian(x.shape[-1], device=x.device)
        self.hessian.add(x, mask)
        if self.watch is not None:
            self.watch.add(x, mask, self.hessian)

    def add_drift(
        self,
        x: torch.Tensor,
        original: ReferenceActivations,
        stream: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> None:
        """Adds how far a batch's input and residual stream are from the original model's.

        Args:
            x, stream: input, and the residual stream that the group's linear adds to.
            original: the same in the original model.
            mask: False marks padding.
        """
        width = x.shape[-1]
        if stream is not None and original.stream is not None:
            if self.residual_drift is None:
                self.residual_drift = CrossMoment(stream.shape[-1], width, device=x.device)
            self.residual_drift.add(original.stream, stream, x, mask, self._reached(original))
        if original.x is not None:
            if self.input_drift is None:
                self.input_drift = CrossMoment(width, width, device=x.device)
            self.input_drift.add(original.x, x, x, mask)

    def _reached(self, original: ReferenceActivations) -> torch.Tensor | None:
        """X̃Wᵀ α/β, without the linear's bias."""
        if self.linear is None or original.y is None:
            return None
        bias = self.linear.bias
        y = original.y - bias if isinstance(bias, torch.Tensor) else original.y
        return y if self.ratio == 1.0 else y * self.ratio

    def _alike(self) -> InputGroup:
        """Another part of the sums."""
        return InputGroup(self.names, residual=self.residual, linear=self.linear, ratio=self.ratio)

    def join(self, ranks: Ranks, device: torch.device) -> None:
        """Makes the sums those over all ranks, of which some may have met no token."""
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
                ranks.sum(mine.sum)
                mine.tokens = int(ranks.sum(torch.tensor([mine.tokens])))
        if any(ranks.all_reduce_max(self.held is not None)):
            self.held = self.held or self._alike()
            self.held.join(ranks, device)

    def drift(self, H: torch.Tensor) -> Drift:
        """The mean cross moments, H being the Hessian's mean. Ends the sums; no weight is new yet."""
        moments = (self.input_drift, self.residual_drift)
        drift = Drift(*(moment.mean() if moment else None for moment in moments))
        if self.linear is not None:
            drift.subtract_output(weight_of(self.linear), H, self.ratio)
        return drift

    def forget(self) -> None:
        """Frees the sums."""
        self.hessian = self.input_drift = self.residual_drift = self.held = self.watch = None
        self.linear = None


@dataclass
class ReferenceActivations:
    """What the original model feeds a group with, and the residual stream beside it."""

    stream: torch.Tensor | None
    x: torch.Tensor | None = None
    """Its input; None where the output tells all that counts."""
    y: torch.Tensor | None = None
    """The output of `InputGroup.linear`."""


@dataclass
class BlockTrace:
    """Tensors that passed during a probe, in order of time."""

    inputs: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    """(linear, its input)."""
    outputs: list[tuple[str, torch.Tensor, int]] = field(default_factory=list)
    """(linear, its output, how many of `stream` had been seen by then)."""
    stream: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    """(module, its input) for every module of the block; last, the block's output."""

    def groups(self) -> list[InputGroup]:
        """Groups in the order in which they are reached.

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
        found: dict[tuple[int, int, int], InputGroup] = {}
        for name, x in self.inputs:
            found.setdefault((x.data_ptr(), x.numel(), x._version), InputGroup([])).names.append(
                name
            )
        outputs = {name: (y, seen) for name, y, seen in self.outputs}
        for group in found.values():
            if len(group.names) == 1 and group.names[0] in outputs:
                group.residual = self._added_to(*outputs[group.names[0]])
        return list(found.values())

    def _added_to(self, y: torch.Tensor, seen: int) -> str | None:
        """The module whose input r gave r + y, exactly, something that was seen after y."""
        for module, r in self.stream[:seen]:
            if r.numel() == y.numel() and r.shape[-1] == y.shape[-1]:
                total = (r.reshape(y.shape) + y).reshape(-1)
                later = (z.reshape(-1) for _, z in self.stream[seen:] if z.numel() == y.numel())
                if any(torch.equal(total, z) for z in later):
                    return module
        return None


@contextmanager
def trace_block(block: Block) -> Iterator[BlockTrace]:
    """Hooks on every module of the block while the probe plays it."""
    notes = BlockTrace()
    hooks: list[Any] = []

    def before(name: str, *, linear: bool, stream: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor):
                if stream:
                    notes.stream.append((name, args[0]))
                if linear:
                    notes.inputs.append((name, args[0]))

        return hook

    def after(name: str) -> Any:
        def hook(_: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> None:
            notes.outputs.append((name, output, len(notes.stream)))

        return hook

    experts = tuple(f"{path}." for path in block.experts)
    for path, module in block.modules():
        # The stream does not pass inside experts, and no single one's output is all that is added to it.
        outside, linear = not path.startswith(experts), path in block.linears
        hooks.append(module.register_forward_pre_hook(before(path, linear=linear, stream=outside)))
        if linear and outside:
            hooks.append(module.register_forward_hook(after(path)))
    try:
        yield notes
    finally:
        for hook in hooks:
            hook.remove()
