"""A batch on its way through the model, and the places where it stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from roundwise.calibration.windows import Batch
from roundwise.forward.expert_tokens import RoutedBatch
from roundwise.forward.input_groups import ReferenceActivations
from roundwise.system.distributed import Ranks

ENTER, COUNTED, GATHERED, EXIT = -2, -1, 1 << 20, 1 << 21
#: Tokens that are compared at a time.
ROWS = 1024


@dataclass
class PausedBatch:
    """One batch on its way through the model."""

    batch: Batch
    number: int
    """Place among the batches; -1 is the probe."""
    reference: PausedBatch | None = None
    """The player of the same batch in the original model; of such a one, that in the quantized model."""
    is_reference: bool = False
    """Plays the original weights."""
    task: greenlet | None = None
    stopped_at: int = EXIT
    block_inputs: Any = None
    """What the block was called with, while the player stands in front of it."""
    output: Any = None
    """What the block returned, while the player stands behind it."""
    candidate_output: Any = None
    """What the block returned with other weights than its own."""
    resumed_outputs: dict[int, Any] = field(default_factory=dict)
    """What the last block returned that an earlier run has finished, by `Block.stack`."""
    reference_activations: dict[str, ReferenceActivations] = field(default_factory=dict)
    """Of an original player: what it met in front of each group that its twin has yet to reach."""
    residual_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """Inputs of the modules that see the residual stream."""
    expert_tokens: dict[str, RoutedBatch] = field(default_factory=dict)
    """Its tokens in each module of experts."""

    @property
    def key(self) -> str:
        """What it is called where activations are kept; the same on whichever rank it plays."""
        if self.number < 0:
            return "probe"
        return f"{'original' if self.is_reference else 'quantized'}-{self.number}"


class WeightSwap:
    """The solved linears of a block with both of their weights; one of them is in place."""

    def __init__(self) -> None:
        self._weights: list[tuple[Any, Any, Any]] = []
        self._original = False

    def add(self, linears: Sequence[Any], before: Sequence[Any]) -> None:
        """Linears that have their new weights, and what they had before."""
        self._weights += [(x, w, x.weight) for x, w in zip(linears, before, strict=True)]

    def show(self, *, is_reference: bool) -> None:
        """Gives all of them their original or their quantized weights."""
        if is_reference != self._original:
            for linear, before, after in self._weights:
                linear.weight = before if is_reference else after
            self._original = is_reference


def hidden(output: Any) -> torch.Tensor:
    """The hidden states among what a block returned."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, torch.Tensor)
    return found


def depth_error(
    players: Sequence[PausedBatch],
    ranks: Ranks,
    onloaded: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> float | None:
    """How far the quantized model is from the original behind a block: ‖h - h̃‖² / ‖h̃‖².

    Args:
        players: of the quantized model, standing behind the block with their twins.
        ranks: who have the others.
        present: see `ForwardScheduler.onloaded`.

    Returns:
        Over the hidden states h of all tokens that count; None where the original is not played.
    """
    lost = whole = 0.0
    for player in players:
        if player.reference is None:
            return None
        with onloaded(player.key), onloaded(player.reference.key):
            mine, all_ = _distance(player, player.reference)
        lost, whole = lost + mine, whole + all_
    lost, whole = ranks.sum(torch.tensor([lost, whole], dtype=torch.float64)).tolist()
    return lost / whole if whole else None


def _distance(player: PausedBatch, reference: PausedBatch) -> tuple[float, float]:
    """‖h - h̃‖² and ‖h̃‖² of one batch."""
    width = hidden(player.output).shape[-1]
    h, is_reference = (hidden(p.output).reshape(-1, width) for p in (player, reference))
    mask = player.batch.counting
    counting = (
        mask.reshape(-1).to(h.device) if mask is not None and mask.numel() == len(h) else None
    )
    lost = whole = 0.0
    for start in range(0, len(h), ROWS):  # float32 copies of a few rows only
        rows = slice(start, start + ROWS)
        now, then = h[rows].float(), is_reference[rows].float()
        if counting is not None:
            now, then = now[counting[rows]], then[counting[rows]]
        lost += float((now - then).square().sum())
        whole += float(then.square().sum())
    return lost, whole


def stop(place: int) -> None:
    """Hands control from a player back to the conductor."""
    parent = getcurrent().parent
    assert parent is not None
    parent.switch(place)
