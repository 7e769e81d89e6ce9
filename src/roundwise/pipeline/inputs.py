"""What a group of linears is solved with: the moments of its input, damping, and one factor for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.clock import clock
from roundwise.core.correct import Drift
from roundwise.core.solver import Prepared, prepare
from roundwise.errors import SingularError
from roundwise.pipeline.damping import Damping, choose, moments
from roundwise.pipeline.probe import Group


class Inputs:
    """What is known of a group's input; its Hessian is factored once for all linears alike."""

    def __init__(self, group: Group) -> None:
        self.fit, self.held = moments(group), moments(group.held)
        if self.fit is None:
            self.fit, self.held = self.held, None
        self.tokens = sum(part.tokens for part in (self.fit, self.held) if part)
        self.damping = Damping()
        self._waiting = len(group.names)
        self._known: dict[tuple[Any, ...], Prepared] = {}

    def choose_damping(self, weights: Iterator[tuple[torch.Tensor, QuantizeConfig]]) -> None:
        """Settles damping on the tokens held out, if any; from then on `fit` holds all tokens."""
        if self.fit is not None and self.held is not None:
            with clock.phase("choose"):
                self.damping, self.held = choose([*weights], self.fit, self.held), None

    def lost(
        self, W: torch.Tensor, settings: QuantizeConfig, rows: slice | None
    ) -> torch.Tensor | None:
        """What the weight W is to make up for; asked once for each linear, and freed with the last.

        `rows`: those of the whole weight that W has; None: all.
        """
        if self.fit is None:
            return None
        with clock.phase("drift"):
            drift = self.fit.drift if rows is None else self.fit.drift.rows(rows)
            Y = drift.lost(W, settings.alpha, settings.beta)
        self._waiting -= 1
        if not self._waiting:
            # A moment may be as large as H, whose factor is still to come.
            self.fit.drift = Drift()
        return Y

    def prepared(self, settings: QuantizeConfig) -> Prepared:
        """Order and factor; SingularError when there is no Hessian."""
        H, settings = self.moment(), self.damping.settled(settings)
        key = (settings.group_size, settings.desc_act, settings.order, settings.damp_percent)
        if key not in self._known:
            with clock.phase("factor"):
                self._known = {key: prepare(H, settings)}
        return self._known[key]

    def moment(self) -> torch.Tensor:
        """The Hessian; SingularError when there is none."""
        if self.fit is None:
            raise SingularError("no calibration token reached this layer")
        return self.fit.H
