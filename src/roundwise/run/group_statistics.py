"""GroupStatistics: what the linears that read one input are solved with, once all batches have passed.

One of eight calibration batches is held out while the correction for earlier layers is fitted, and says
which part of it is more than noise. Then its tokens are added, so that all of them count in the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from roundwise.config import HELD_OUT_EVERY, QuantizeConfig
from roundwise.core.confirmed_shift import confirmed_part
from roundwise.core.drift import Drift, Moments
from roundwise.core.solver import PreparedHessian, prepare_hessian
from roundwise.errors import SingularError
from roundwise.system.timer import timer


def held_out_batches(config: QuantizeConfig, batches: int) -> frozenset[int]:
    """Returns the numbers of the batches to hold out; none if nothing is corrected, or of one batch.

    Args:
        config: settings.
        batches: number of calibration batches.
    """
    if not config.needs_reference or batches < 2:
        return frozenset()
    return frozenset(range(HELD_OUT_EVERY - 1, batches, HELD_OUT_EVERY)) or frozenset([batches - 1])


@dataclass(frozen=True)
class GroupStatistics:
    """Statistics that the linears of a group are solved with."""

    moments: Moments | None
    """Moments of their input; None: no calibration token reached the group."""
    confirmed: Mapping[str, float] = field(default_factory=dict)
    """Linear -> part of its target shift that held-out tokens confirm; without it: all of it."""
    _factors: dict[tuple[Any, ...], PreparedHessian] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Calibration tokens in the moments."""
        return self.moments.tokens if self.moments is not None else 0

    @property
    def H(self) -> torch.Tensor:  # noqa: N802
        """The Hessian [in, in].

        Raises:
            SingularError: there is none.
        """
        if self.moments is None:
            raise SingularError("no calibration token reached this layer")
        return self.moments.H

    def prepared(self, settings: QuantizeConfig) -> PreparedHessian:
        """Order and factor of the Hessian, computed once for linears with the same settings.

        Raises:
            SingularError: see `prepare_hessian`, or there is no Hessian.
        """
        H = self.H
        key = (settings.group_size, settings.desc_act, settings.order, settings.damp_percent)
        if key not in self._factors:
            self._factors.clear()  # a factor is as large as H: one at a time
            with timer.phase("factor"):
                self._factors[key] = prepare_hessian(H, settings)
        return self._factors[key]

    def take_target_shift(
        self,
        name: str,
        W: torch.Tensor,
        settings: QuantizeConfig,
        rows: slice | None,
        *,
        last: bool,
    ) -> torch.Tensor | None:
        """Returns the shift of the target that makes up for earlier layers, [out, in]; None: no shift.

        Args:
            name: the linear.
            W: its weight, or some rows of it.
            settings: its `alpha` and `beta` count.
            rows: the rows of the whole weight that W has; None: all.
            last: the drift is dropped: a moment may be as large as H, whose factor is still to come.
        """
        if self.moments is None:
            return None
        with timer.phase("drift"):
            drift = self.moments.drift if rows is None else self.moments.drift.rows(rows)
            Y = drift.take_target_shift(W, settings.alpha, settings.beta)
            if Y is not None:
                Y *= self.confirmed.get(name, 1.0)
        if last:
            self.moments.drift = Drift()
        return Y


def group_statistics(
    weights: Mapping[str, tuple[torch.Tensor, QuantizeConfig]],
    fit: Moments | None,
    held: Moments | None,
) -> GroupStatistics:
    """Returns the statistics over all tokens, with the part of each correction that is confirmed.

    A correction is not used where no held-out token reached the group.

    Args:
        weights: linear -> its weight [out, in] and its settings.
        fit: moments of the tokens that are not held out; `held` is added to them.
        held: moments of those that are.
    """
    if fit is None or held is None:
        moments = fit if fit is not None else held
        corrected = moments is not None and not moments.drift.is_empty
        return GroupStatistics(moments, dict.fromkeys(weights, 0.0) if corrected else {})
    fitted, confirmed = GroupStatistics(fit), dict[str, float]()
    for name, (W, settings) in weights.items():
        try:
            prepared = fitted.prepared(settings)
        except SingularError:  # the solver fails too, and reports it
            continue
        with timer.phase("drift"):
            part = confirmed_part(W, settings, fit, prepared, held)
        if part is not None:
            confirmed[name] = part
    fit.join(held)
    return GroupStatistics(fit, confirmed)
