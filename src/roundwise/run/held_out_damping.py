"""`damp_percent=auto` in a run: some batches are held out of a group's moments for the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.drift import Moments
from roundwise.core.held_out_damping import held_out_losses
from roundwise.errors import CalibrationError, SingularError

#: One batch in so many is held out.
EVERY = 8
#: Damping where no held-out token reached a layer.
DEFAULT = 0.01


@dataclass(frozen=True)
class Damping:
    """What was chosen for a group."""

    damp_percent: float = DEFAULT
    losses: dict[float, float] | None = None
    """Damping -> loss on held-out tokens; None: there were none."""

    def settle(self, settings: QuantizeConfig) -> QuantizeConfig:
        """The settings, with this damping if they leave it open."""
        if settings.damp_percent != "auto":
            return settings
        return settings.merged({"damp_percent": self.damp_percent})

    def record(self, settings: QuantizeConfig) -> dict[str, Any]:
        """For the result: what the choice rests on, where there was one."""
        if settings.damp_percent != "auto" or settings.method != "gptq":
            return {}
        if self.losses is None:
            return {"damp_losses": None}
        return {"damp_losses": {f"{damping:g}": loss for damping, loss in self.losses.items()}}


def held_out_batches(config: QuantizeConfig, batches: int) -> frozenset[int]:
    """Numbers of the batches to hold out; none unless damping is to be chosen.

    Raises:
        CalibrationError: damping is to be chosen, and there is but one batch.
    """
    if config.damp_percent != "auto" or config.method != "gptq":
        return frozenset()
    if batches < 2:
        raise CalibrationError(
            "damp_percent=auto holds one batch of calibration windows out, but there is only one: "
            "use a smaller --batch-size or more --samples"
        )
    return frozenset(range(EVERY - 1, batches, EVERY)) or frozenset([batches - 1])


def choose_damping(
    weights: Sequence[tuple[torch.Tensor, QuantizeConfig]], fit: Moments, held: Moments
) -> Damping:
    """The damping with the least loss on held-out tokens; then `fit` holds all tokens.

    Args:
        weights: W [out, in] and its settings, each, of linears that read the same input.
        fit: moments to solve with; `held` is joined to them.
        held: moments of the tokens held out.
    """
    try:
        losses = held_out_losses(weights, fit, held)
    except SingularError:  # the solver meets it too, and says so
        return Damping()
    finally:
        fit.join(held)
    return Damping(min(losses, key=losses.__getitem__), losses)
