"""BlockSolver: from the sums over a group's input to packed weights, for all groups of one block.

Each weight is solved, put into the running model as the values that its codes stand for, and packed for
its file. Of several ranks, each solves its share of the rows, which are independent given the Hessian.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from roundwise.checkpoint.formats import encoder
from roundwise.checkpoint.manifest import LayerRecord
from roundwise.config import QuantizeConfig
from roundwise.core.backends.dispatch import choose_backend
from roundwise.core.drift import Drift, Moments, SampledRows, confirm
from roundwise.core.hessian import Hessian
from roundwise.core.linalg import factor
from roundwise.core.quantized_weight import QuantizedWeight
from roundwise.core.solver import (
    PreparedHessian,
    prepare_hessian,
    round_to_nearest,
    sample_rows,
    solve,
)
from roundwise.errors import NumericalError, SingularError
from roundwise.forward.input_groups import InputGroup
from roundwise.model.blocks import Block, set_weight, weight_of
from roundwise.system.device import HOST
from roundwise.system.distributed import Ranks
from roundwise.system.memory import reuse_small_blocks
from roundwise.system.timer import timer


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
    """Returns the statistics over all tokens, with corrections as far as they are confirmed.

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
    samples = {
        name: SampledRows(W[sample_rows(W)], sample_rows(W), settings.alpha, settings.beta)
        for name, (W, settings) in weights.items()
    }
    with timer.phase("drift"):
        try:
            ridge, confirmed = confirm(samples, fit, held)
        except SingularError:  # the solver fails too, and reports it
            ridge, confirmed = 0.0, {}
        fit.join(held)
        damping = next((settings.damp_percent for _, settings in weights.values()), ridge)
        if confirmed and ridge != damping:
            F = factor(fit.H, torch.arange(len(fit.H), device=fit.H.device), ridge)
            fit.drift.shrink(F, (ridge - damping) * float(fit.H.diagonal().mean()))
    return GroupStatistics(fit, confirmed)


class BlockSolver:
    """Solves the groups of one block, and keeps what is to be written.

    Args:
        block: its weights are loaded.
        config: settings.
        ranks: the processes of the run, which share the rows.
        maps: linear -> memory map of its weight; its pages are released once it is solved.
        gradients: linear -> gradients of its output; see `OutputGradients.of_block`.
        on_layer: called with the record of each layer.
        device: where the block is loaded.
    """

    def __init__(
        self,
        block: Block,
        config: QuantizeConfig,
        *,
        ranks: Ranks,
        maps: Mapping[str, mmap.mmap],
        gradients: Mapping[str, list[torch.Tensor]],
        on_layer: Callable[[LayerRecord], None],
        device: torch.device = HOST,
    ) -> None:
        self.block, self.config, self.ranks = block, config, ranks
        self._on_layer, self._maps, self._gradients = on_layer, maps, gradients
        self._settings = {name: config.for_module(name) for name in block.linears}
        self._needs_gradients = config.needs_gradients
        self._encode = encoder(config.format)
        self._backend = choose_backend(torch.empty(0, dtype=torch.float32, device=device))
        self.packed: dict[str, dict[str, torch.Tensor]] = {}
        """Linear -> suffix -> tensor of the format."""
        self.layers: list[LayerRecord] = []
        """Records, in the order of solving."""

    @reuse_small_blocks()
    def solve(self, group: InputGroup) -> None:
        """Quantizes the linears of a group whose sums are complete."""
        for name in self.packed:  # all batches have passed the linears of earlier groups by now
            if name in self._maps:
                self._maps[name].madvise(mmap.MADV_DONTNEED)
        moments = group.take_moments()
        held = group.held.take_moments() if group.held is not None else None
        statistics = group_statistics(self._weights(group), moments, held)
        left = len(group.names)
        for name in group.names:
            settings = self._settings[name]
            left -= 1
            if settings is not None:
                self._solve_linear(name, group, settings, statistics, last=not left)

    def quantize_remaining(self) -> None:
        """Quantizes linears that no group had: the forward never calls them, or there was none."""
        self.solve(InputGroup([name for name in self.block.linears if name not in self.packed]))

    def _solve_linear(
        self, name: str, group: InputGroup, settings: QuantizeConfig, statistics: GroupStatistics,
        *, last: bool,
    ) -> None:  # fmt: skip
        """Quantizes one linear: solves it, replaces its weight in the model, packs and records it."""
        linear = self.block.linears[name]
        W = weight_of(linear)
        B, gradients = self._output_weights(name) if self._needs_gradients else (None, 0)
        with timer.phase("solve"):
            q = self._quantize(name, W, statistics, settings, B, last=last)
        with timer.phase("pack"):
            set_weight(linear, q.dequantize(W.dtype))
            tensors = self._encode(q, settings).items()
            self.packed[name] = {suffix: tensor.to(HOST) for suffix, tensor in tensors}
        # Fields that only some settings have: those that are not set are not written.
        optional: dict[str, Any] = {}
        if name in statistics.confirmed:
            optional["confirmed_drift"] = statistics.confirmed[name]
        record = LayerRecord(
            name=name,
            bits=q.bits,
            group_size=settings.group_size,
            relative_error=q.relative_error,
            weight_error=q.weight_error,
            damp_percent=q.damp_percent,
            damp_tried=[*q.damp_tried],
            tokens=statistics.tokens,
            fallback=q.fallback or group.fallback,
            gradients=gradients,
            **optional,
        )
        self.layers.append(record)
        self._on_layer(record)

    def _output_weights(self, name: str) -> tuple[torch.Tensor | None, int]:
        """B = gᵀg / n [out, out] of the gradients g of a linear's output, and n; None: they are zero.

        B tells what errors of two outputs cost together (`core.output_weighting`).
        """
        parts = self._gradients.get(name)
        if not parts:
            return None, 0
        with timer.phase("gradients"):
            moment = Hessian(parts[0].shape[1])
            for g in parts:
                moment.add(g)
            tokens, B = moment.tokens, moment.take_mean()
        return (B, tokens) if float(B.diagonal().sum()) > 0 else (None, 0)

    def _weights(self, group: InputGroup) -> dict[str, tuple[torch.Tensor, QuantizeConfig]]:
        """The weights of a group that are quantized, and their settings."""
        return {
            name: (weight_of(self.block.linears[name]), settings)
            for name in group.names
            if (settings := self._settings[name]) is not None
        }

    def _quantize(
        self, name: str, W: torch.Tensor, statistics: GroupStatistics, settings: QuantizeConfig,
        B: torch.Tensor | None, *, last: bool,
    ) -> QuantizedWeight:  # fmt: skip
        """Quantizes one weight, each rank its share of the rows.

        Raises:
            NumericalError: naming the layer.
        """
        try:
            if self.ranks.is_single or B is not None:
                # Rows that are coupled by B are shared inside the solver, part by part.
                return self._quantize_rows(name, W, statistics, settings, None, B, last=last)
            mine = self.ranks.row_range(len(W))
            count = mine.stop - mine.start
            # A rank that has no rows of a small weight solves the first one, and drops it.
            rows = mine if count else slice(0, 1)
            q = self._quantize_rows(name, W[rows], statistics, settings, rows, None, last=last)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from error
        return _gather_rows(q, count, len(W), self.ranks)

    def _quantize_rows(
        self, name: str, W: torch.Tensor, statistics: GroupStatistics, settings: QuantizeConfig,
        rows: slice | None, B: torch.Tensor | None, *, last: bool,
    ) -> QuantizedWeight:  # fmt: skip
        """Quantizes some rows; rounds them to nearest, with the reason, where they cannot be solved."""
        if settings.method == "rtn":
            return round_to_nearest(W, settings)
        try:
            shift = statistics.take_target_shift(name, W, settings, rows, last=last)
            B = None if B is None else B.to(W.device)
            return solve(
                W, statistics.prepared(settings), settings, target_shift=shift, outputs=B,
                process_group=None if self.ranks.is_single else self.ranks, backend=self._backend,
            )  # fmt: skip
        except SingularError as error:
            return round_to_nearest(W, settings, fallback=str(error))


def _gather_rows(q: QuantizedWeight, count: int, total: int, ranks: Ranks) -> QuantizedWeight:
    """A weight of `total` rows from the parts that the ranks have solved.

    Args:
        q: this rank's part.
        count: how many of its rows count.
        total: rows of the weight.
        ranks: the processes of the run.
    """
    codes, scales, zeros = (
        ranks.all_gather_rows(part[:count], total) for part in (q.codes, q.scales, q.zeros)
    )
    known = q.relative_error is not None
    sums = [(q.relative_error or 0.0) * q.energy, q.energy]
    sums += [q.weight_error * q.weight_energy, q.weight_energy]
    mine = torch.tensor(sums if count else [0.0] * 4, dtype=torch.float64)
    loss, energy, error, weight = ranks.all_reduce_sum(mine).tolist()
    return replace(
        q, codes=codes, scales=scales, zeros=zeros, energy=energy, weight_energy=weight,
        relative_error=(loss / energy if energy else 0.0) if known else None,
        weight_error=error / weight if weight else 0.0,
    )  # fmt: skip
