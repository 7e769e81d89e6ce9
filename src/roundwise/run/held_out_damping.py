"""Damping of a run with damp_percent=auto: chosen for each group on held-out calibration batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.drift import Moments
from roundwise.core.held_out_damping import held_out_losses
from roundwise.errors import CalibrationError, SingularError

#: One of this many batches is held out.
EVERY = 8
#: Damping if no held-out token reaches a layer.
DEFAULT = 0.01


@dataclass(frozen=True)
class Damping:
    """Chosen damping of a group."""

    damp_percent: float = DEFAULT
    losses: dict[float, float] | None = None
    """Damping -> loss on held-out tokens; None: there were no held-out tokens."""

    def settle(self, settings: QuantizeConfig) -> QuantizeConfig:
        """Returns the settings, with this damping instead of "auto"."""
        if settings.damp_percent != "auto":
            return settings
        return settings.merged({"damp_percent": self.damp_percent})

    def record(self, settings: QuantizeConfig) -> dict[str, Any]:
        """Returns the fields of a `LayerRecord` about the choice; empty if damping was not chosen."""
        if settings.damp_percent != "auto" or settings.method != "gptq":
            return {}
        if self.losses is None:
            return {"damp_losses": None}
        return {"damp_losses": {f"{damping:g}": loss for damping, loss in self.losses.items()}}


def held_out_batches(config: QuantizeConfig, batches: int) -> frozenset[int]:
    """Returns the numbers of the batches to hold out; none unless damping is "auto".

    Args:
        config: settings.
        batches: number of calibration batches.

    Raises:
        CalibrationError: damping is "auto", and there is only one batch.
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
    weights: Sequence[tuple[torch.Tensor, QuantizeConfig]],
    fit: Moments | None,
    held: Moments | None,
) -> Damping:
    """Returns the damping with the lowest loss on held-out tokens; adds `held` to `fit`.

    Args:
        weights: W [out, in] and settings of each linear that reads the input.
        fit: moments of the input to solve with; None: there are none.
        held: moments of the held-out tokens; None: there are none.
    """
    if fit is None or held is None:
        return Damping()
    try:
        losses = held_out_losses(weights, fit, held)
    except SingularError:  # the solver fails too, and reports it
        return Damping()
    finally:
        fit.join(held)
    return Damping(min(losses, key=losses.__getitem__), losses)
