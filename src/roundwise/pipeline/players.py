"""A batch on its way through the model, and the places where it stops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from roundwise.pipeline.probe import Captured
from roundwise.pipeline.routing import Passing
from roundwise.pipeline.windows import Batch

ENTER, COUNTED, GATHERED, EXIT = -2, -1, 1 << 20, 1 << 21


@dataclass
class Player:
    """One batch on its way through the model."""

    batch: Batch
    number: int
    """Place among the batches; -1 is the probe."""
    twin: Player | None = None
    """The player of the same batch in the original model; of such a one, that in the quantized model."""
    original: bool = False
    """Plays the original weights."""
    task: greenlet | None = None
    at: int = EXIT
    output: Any = None
    """What the block returned, while the player stands behind it."""
    trial: Any = None
    """What the block returned with other weights than its own."""
    finished: dict[int, Any] = field(default_factory=dict)
    """What the last block returned that an earlier run has finished, by `Block.stack`."""
    captured: dict[str, Captured] = field(default_factory=dict)
    """Of an original player: what it met in front of each group that its twin has yet to reach."""
    streams: dict[str, torch.Tensor] = field(default_factory=dict)
    """Inputs of the modules that see the residual stream."""
    passing: dict[str, Passing] = field(default_factory=dict)
    """Its tokens in each module of experts."""


def stop(place: int) -> None:
    """Hands control from a player back to the conductor."""
    parent = getcurrent().parent
    assert parent is not None
    parent.switch(place)
