"""From what is summed up about a group's input to packed weights, for all groups of one block.

Each weight is solved, put into the running model as what its codes stand for, and packed for the shard.
Of several ranks each solves its share of the rows, which are independent given the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.awq import round_searched
from roundwise.core.clock import clock
from roundwise.core.device import HOST
from roundwise.core.quantized import QuantizedWeight
from roundwise.core.solver import round_to_nearest, solve
from roundwise.errors import NumericalError, SingularError
from roundwise.models.blocks import Block, set_weight, weight_of
from roundwise.models.formats import encode
from roundwise.pipeline.inputs import Inputs
from roundwise.pipeline.memory import reusing
from roundwise.pipeline.prescale import Prescaler, Scaling
from roundwise.pipeline.probe import Group
from roundwise.pipeline.ranks import Ranks
from roundwise.pipeline.record import join_parts, layer_record


class BlockSolver:
    """Solves the groups of one block, and keeps what is to be written.

    Args:
        block: its weights are loaded.
        config: settings.
        prescaler: finds scales for groups; None: none are wanted.
        ranks: with whom the rows are shared.
        release: called with the names of the linears that are solved: their pages are not read again.
        tell: called with the record of each layer.
        outputs: what errors of a linear's outputs cost together, and from how many gradients that is
            known; see `Curvature.of_block`.
    """

    def __init__(
        self,
        block: Block,
        config: QuantizeConfig,
        *,
        prescaler: Prescaler | None,
        ranks: Ranks,
        release: Callable[[list[str]], None],
        tell: Callable[[dict[str, Any]], None],
        outputs: Callable[[str], tuple[torch.Tensor | None, int]],
    ) -> None:
        self.block, self.config, self.ranks = block, config, ranks
        self._prescaler, self._release, self._tell = prescaler, release, tell
        self._outputs = outputs
        self.packed: dict[str, dict[str, torch.Tensor]] = {}
        """Linear -> suffix -> tensor of the format."""
        self.folded: dict[str, torch.Tensor] = {}
        """Tensors that scales were moved into."""
        self.layers: list[dict[str, Any]] = []
        """Records, in the order of solving."""

    @reusing()
    def solve(self, group: Group) -> None:
        """Quantizes the linears of a group whose sums are complete."""
        # Everybody is behind the linears of earlier groups by now.
        self._release(list(self.packed))
        inputs = Inputs(group)
        scaling = self._prescale(group, inputs)
        self.folded.update(scaling.tensors)
        inputs.choose_damping(self._weights(group, scaling))
        for name in group.names:
            settings = self.config.for_module(name)
            if settings is None:
                continue
            linear = self.block.linears[name]
            B, gradients = self._outputs(name) if settings.needs_gradients else (None, 0)
            with clock.phase("solve"):
                q = self._weight(name, scaling.apply(weight_of(linear)), inputs, settings, B)
            with clock.phase("pack"):
                set_weight(linear, scaling.undo(q.dequantize(weight_of(linear).dtype)))
                packed = encode(q, settings).items()
                self.packed[name] = {suffix: part.to(HOST) for suffix, part in packed}
            record = layer_record(name, q, settings, inputs.tokens)
            record |= {"gradients": gradients, "fallback": q.fallback or group.fallback}
            self.layers.append(record | scaling.record(name) | inputs.damping.record(settings))
            self._tell(self.layers[-1])

    def rest(self) -> None:
        """Quantizes what no group had: linears the forward never called, or all without calibration."""
        self.solve(Group([name for name in self.block.linears if name not in self.packed]))

    def _prescale(self, group: Group, inputs: Inputs) -> Scaling:
        """Scales for the group's input, if any; `inputs` becomes that of the scaled weights."""
        if self._prescaler is None or inputs.fit is None:
            return Scaling()
        with clock.phase("choose"):
            scaling = self._prescaler.search(self.block, group.names, inputs.fit.H)
        for part in (inputs.fit, inputs.held):
            if part is not None and scaling.s is not None:
                part.divide(scaling.s)
        return scaling

    def _weights(
        self, group: Group, scaling: Scaling
    ) -> Iterator[tuple[torch.Tensor, QuantizeConfig]]:
        """The weights of a group that are to be quantized, and their settings."""
        for name in group.names:
            settings = self.config.for_module(name)
            if settings is not None:
                yield scaling.apply(weight_of(self.block.linears[name])), settings

    def _weight(
        self, name: str, W: torch.Tensor, inputs: Inputs, settings: QuantizeConfig,
        B: torch.Tensor | None,
    ) -> QuantizedWeight:  # fmt: skip
        """One weight, its rows shared out unless they are coupled; a named error where it fails."""
        try:
            if (
                self.ranks.alone or B is not None
            ):  # coupled rows are shared by the solver, part by part
                return self._rows(W, inputs, settings, None, B)
            mine = self.ranks.rows(len(W))
            count = mine.stop - mine.start
            # A rank that has no row of a small weight solves the first one, for nobody.
            rows = mine if count else slice(0, 1)
            q = self._rows(W[rows], inputs, settings, rows, None)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from error
        return join_parts(q, count, len(W), self.ranks)

    def _rows(
        self, W: torch.Tensor, inputs: Inputs, settings: QuantizeConfig, rows: slice | None,
        B: torch.Tensor | None,
    ) -> QuantizedWeight:  # fmt: skip
        """Some rows; rounded to nearest, with the reason recorded, where they cannot be solved."""
        if settings.method == "rtn":
            return round_to_nearest(W, settings)
        try:
            if settings.method == "awq":
                return round_searched(W, inputs.moment(), settings)
            lost = inputs.lost(W, settings, rows)
            B = None if B is None else B.to(W.device)
            helpers = None if self.ranks.alone else self.ranks
            return solve(
                W, inputs.prepared(settings), settings, lost=lost, outputs=B, helpers=helpers
            )
        except SingularError as error:
            return round_to_nearest(W, settings, fallback=str(error))
