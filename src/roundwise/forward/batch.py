"""PausedBatch: one calibration batch whose forward stops on the way, and the places where it stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet

from roundwise.calibration.windows import Batch, shortest_with_media
from roundwise.errors import CheckpointError
from roundwise.forward.expert_tokens import RoutedBatch
from roundwise.forward.input_groups import ReferenceActivations
from roundwise.model.blocks import Block
from roundwise.model.foreign_errors import raise_foreign
from roundwise.system.distributed import Ranks

#: Tokens of the text probe: enough for any local attention pattern to be well formed.
PROBE_TOKENS = 8
#: Tokens that are compared at a time in `depth_error`.
ROWS = 1024


class Phase(IntEnum):
    """The places where a batch stops at a block, in the order in which it reaches them."""

    ENTER = 0
    """In front of the block, before it needs the block's weights."""
    COUNTED = 1
    """After a pass that only counted the tokens of each expert (block mode)."""
    GROUP = 2
    """Inside the block, in front of a group of linears (sequential mode) or its experts."""
    GATHERED = 3
    """After a pass that only summed up Hessians (block mode)."""
    EXIT = 4
    """After the block, with its output."""


class Stop(NamedTuple):
    """A place where a batch stops. Stops compare in the order in which a batch reaches them."""

    phase: Phase
    group: int = 0
    """With `Phase.GROUP`: number of the group in its block."""
    routed: bool = False
    """With `Phase.GROUP`. False: in front of the experts of `group`, after their router chose, before
    tokens are assigned to experts. True: in front of the first linear of `group`."""


ENTER, COUNTED = Stop(Phase.ENTER), Stop(Phase.COUNTED)
GATHERED, EXIT = Stop(Phase.GATHERED), Stop(Phase.EXIT)


def at_experts(group: int) -> Stop:
    """The stop in front of the experts whose first group is number `group`."""
    return Stop(Phase.GROUP, group, routed=False)


def at_group(group: int) -> Stop:
    """The stop in front of the first linear of group number `group`."""
    return Stop(Phase.GROUP, group, routed=True)


def pause(stop: Stop) -> None:
    """Hands control from a batch back to the scheduler, until it resumes the batch.

    Modes of torch that are on belong to the thread, not to the greenlet: the caller switches them off.
    """
    parent = getcurrent().parent
    assert parent is not None
    parent.switch(stop)


@dataclass
class PausedBatch:
    """One batch on its way through the model, in a greenlet of its own."""

    batch: Batch
    number: int
    """Its number among all batches; those of probes are negative."""
    reference: PausedBatch | None = None
    """The same batch in the other model: in the original one, or of a reference in the quantized one."""
    is_reference: bool = False
    """It runs through the original model, with the original weights."""
    task: greenlet | None = None
    block: int = -1
    """Number of the block that it is at, among all blocks of the model."""
    stopped_at: Stop = EXIT
    block_inputs: Any = None
    """Arguments of the block, while the batch is paused in front of it."""
    output: Any = None
    """Return value of the block, while the batch is paused after it."""
    candidate_output: Any = None
    """Return value of the block with other weights than its own; see `ForwardScheduler.try_weights`."""
    resumed_outputs: dict[int, Any] = field(default_factory=dict)
    """`Block.stack` -> return value of that stack's last block that an earlier run has finished."""
    reference_activations: dict[str, ReferenceActivations] = field(default_factory=dict)
    """First linear of a group -> a reference's activations, until the quantized batch uses them."""
    residual_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """Module name -> its input, for the modules that read the residual stream."""
    expert_tokens: dict[str, RoutedBatch] = field(default_factory=dict)
    """Module of experts -> the batch's tokens there."""
    counting: torch.Tensor | None = field(init=False)
    """Bool [windows, length]: the tokens that count; None: all."""

    def __post_init__(self) -> None:
        self.counting = self.batch.counting

    @property
    def is_probe(self) -> bool:
        """It only shows which linears share an input: its activations count for nothing."""
        return self.number < 0

    @property
    def key(self) -> str:
        """Name of the batch in saved activations; the same on whichever rank it runs."""
        if self.is_probe:
            return f"probe{self.number + 1 or ''}"
        return f"{'original' if self.is_reference else 'quantized'}-{self.number}"

    def clear_block(self) -> None:
        """Drops what was kept for the groups of the block that it has passed."""
        for kept in (self.reference_activations, self.residual_inputs, self.expert_tokens):
            kept.clear()


def probes(batches: Sequence[Batch], *, media: bool) -> list[PausedBatch]:
    """Returns the probes: a few tokens of text and, with `media`, one batch for each set of inputs.

    Args:
        batches: all calibration batches.
        media: some blocks are called for pictures or sounds only.
    """
    chosen = [batches[0].probe(PROBE_TOKENS), *(shortest_with_media(batches) if media else ())]
    return [PausedBatch(batch, -1 - i) for i, batch in enumerate(chosen)]


class WeightSwap:
    """The solved linears of a block, with their original and their quantized weights.

    Only one set is in place at a time: batches of the original model need the original weights, all
    other batches the quantized ones.
    """

    def __init__(self) -> None:
        self._weights: list[tuple[Any, Any, Any]] = []
        self._original = False

    def add(self, linears: Sequence[Any], before: Sequence[Any]) -> None:
        """Adds linears that have their quantized weights by now, and the weights they had before."""
        self._weights += [(x, w, x.weight) for x, w in zip(linears, before, strict=True)]

    def use(self, *, original: bool) -> None:
        """Puts the original or the quantized weights in place, if they are not there yet."""
        if original != self._original:
            for linear, before, after in self._weights:
                linear.weight = before if original else after
            self._original = original


def hidden(output: Any) -> torch.Tensor:
    """The hidden states in a block's return value: the value itself, or the first of a tuple."""
    states = output[0] if isinstance(output, tuple) else output
    assert isinstance(states, torch.Tensor)  # `block_output` has checked it
    return states


def run_block(
    block: Block, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Runs a block's own forward; returns what `block_output` does, or an output head's logits.

    Args:
        block: the block.
        original: its forward.
        args, kwargs: its arguments.

    Raises:
        CheckpointError: its forward fails, or returns no hidden states.
    """
    try:
        output = original(*args, **kwargs)
    except Exception as error:
        name = f"block {block.name} ({type(block.module).__name__})"
        raise_foreign(error, f"{name} fails on calibration text")
    return output if block.is_head else block_output(block.name, block.module, output)


def block_output(name: str, block: object, output: Any) -> Any:
    """Returns what a block returned, as a tensor or a tuple that begins with one.

    Args:
        name: name of the block.
        block: the block.
        output: what its forward returned; some return lists.

    Raises:
        CheckpointError: it is something else.
    """
    value = tuple(output) if isinstance(output, list) else output
    first = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(first, torch.Tensor):
        raise CheckpointError(
            f"block {name} ({type(block).__name__}) returns {type(output).__name__} instead of hidden "
            "states, so it cannot be calibrated: use --method rtn"
        )
    return value


def depth_error(
    batches: Sequence[PausedBatch],
    ranks: Ranks,
    onloaded: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> float | None:
    """Distance of the quantized model from the original after a block: ‖h - h̃‖² / ‖h̃‖².

    Args:
        batches: of the quantized model, paused after the block, with their references.
        ranks: all processes of the run; the sums are over the batches of all of them.
        onloaded: see `ForwardScheduler.onloaded`.

    Returns:
        The error over the hidden states h of all tokens that count; None without references.
    """
    lost = whole = 0.0
    for batch in batches:
        if batch.reference is None:
            return None
        with onloaded(batch.key), onloaded(batch.reference.key):
            error, energy = _distance(batch, batch.reference)
        lost, whole = lost + error, whole + energy
    lost, whole = ranks.all_reduce_sum(torch.tensor([lost, whole], dtype=torch.float64)).tolist()
    return lost / whole if whole else None


def _distance(batch: PausedBatch, reference: PausedBatch) -> tuple[float, float]:
    """‖h - h̃‖² and ‖h̃‖² of one batch."""
    width = hidden(batch.output).shape[-1]
    h, original = (hidden(b.output).reshape(-1, width) for b in (batch, reference))
    mask = batch.counting
    counting = (
        mask.reshape(-1).to(h.device) if mask is not None and mask.numel() == len(h) else None
    )
    lost = whole = 0.0
    for start in range(0, len(h), ROWS):  # float32 copies of a few rows only
        rows = slice(start, start + ROWS)
        now, then = h[rows].float(), original[rows].float()
        if counting is not None:
            now, then = now[counting[rows]], then[counting[rows]]
        lost += float((now - then).square().sum())
        whole += float(then.square().sum())
    return lost, whole
