"""Where batches wait when the device has no room for all of them: on the host.

The frames of a waiting batch hold what its block was called with, and nobody can let go of that but the
frames themselves. So the tensors stay, and the memory behind them moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from roundwise.core.device import HOST
from roundwise.models.placement import moved
from roundwise.pipeline.players import EXIT, Player


class Parking:
    """Moves what players hold in front of and behind a block.

    Args:
        device: where players play.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def look_around(self) -> None:
        """Nothing to see: only what a block was called with leaves."""

    def present(self, player: Player) -> AbstractContextManager[None]:
        """Nothing to do: what a player that waits holds can be looked at, on the host."""
        return nullcontext()

    def close(self) -> None:
        """Nothing to give up."""

    def leave(self, player: Player) -> None:
        """Takes the tensors of a player that waits to the host."""
        for x in _hidden(player.given):
            x.data = x.to(HOST)
        player.output = moved(player.output, HOST)

    def fetch(self, player: Player) -> None:
        """Brings back what a player goes on with; behind a block that is its output alone."""
        for x in _hidden(player.given if player.at != EXIT else None):
            x.data = x.to(self.device)


def _hidden(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that are as large as a batch: tokens and masks of two axes may be others' too."""
    if isinstance(value, torch.Tensor):
        if value.ndim > 2 and value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _hidden([*value.values()])
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _hidden(each)
