"""From what is summed up about a group's input to packed weights, for all groups of one block.

Each weight is solved, put into the running model as what its codes stand for, and packed for the shard.
Of several ranks each solves its share of the rows, which are independent given the Hessian.

What a group of linears is solved with: the moments of its input, damping, and one factor for all.

What is written of a block: the tensors of its shard, and a record of each of its layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from roundwise.checkpoint.gptq_format import encode
from roundwise.config import QuantizeConfig
from roundwise.core.activation_scales import round_searched
from roundwise.core.drift import Drift
from roundwise.core.quantized_weight import QuantizedWeight
from roundwise.core.solver import PreparedHessian, prepare_hessian, round_to_nearest, solve
from roundwise.errors import NumericalError, SingularError
from roundwise.forward.input_groups import InputGroup
from roundwise.model.blocks import Block, set_weight, weight_of
from roundwise.model.expert_weights import unquantized_tensors
from roundwise.model.streamed import StreamedModel
from roundwise.run.held_out_damping import Damping, choose_damping, moments
from roundwise.run.prescale import NormScaling, Prescaler
from roundwise.system.device import HOST
from roundwise.system.distributed import Ranks
from roundwise.system.memory import reuse_small_blocks
from roundwise.system.timer import timer


class GroupStatistics:
    """What is known of a group's input; its Hessian is factored once for all linears alike."""

    def __init__(self, group: InputGroup) -> None:
        self.fit, self.held = moments(group), moments(group.held)
        if self.fit is None:
            self.fit, self.held = self.held, None
        self.tokens = sum(part.tokens for part in (self.fit, self.held) if part)
        self.damping = Damping()
        self._waiting = len(group.names)
        self._known: dict[tuple[Any, ...], PreparedHessian] = {}

    def choose_damping(self, weights: Iterator[tuple[torch.Tensor, QuantizeConfig]]) -> None:
        """Settles damping on the tokens held out, if any; from then on `fit` holds all tokens."""
        if self.fit is not None and self.held is not None:
            with timer.phase("choose"):
                self.damping, self.held = choose_damping([*weights], self.fit, self.held), None

    def target_shift(
        self, W: torch.Tensor, settings: QuantizeConfig, rows: slice | None
    ) -> torch.Tensor | None:
        """What the weight W is to make up for; asked once for each linear, and freed with the last.

        `rows`: those of the whole weight that W has; None: all.
        """
        if self.fit is None:
            return None
        with timer.phase("drift"):
            drift = self.fit.drift if rows is None else self.fit.drift.rows(rows)
            Y = drift.target_shift(W, settings.alpha, settings.beta)
        self._waiting -= 1
        if not self._waiting:
            # A moment may be as large as H, whose factor is still to come.
            self.fit.drift = Drift()
        return Y

    def prepared(self, settings: QuantizeConfig) -> PreparedHessian:
        """Order and factor; SingularError when there is no Hessian."""
        H, settings = self.moment(), self.damping.settled(settings)
        key = (settings.group_size, settings.desc_act, settings.order, settings.damp_percent)
        if key not in self._known:
            with timer.phase("factor"):
                self._known = {key: prepare_hessian(H, settings)}
        return self._known[key]

    def moment(self) -> torch.Tensor:
        """The Hessian; SingularError when there is none."""
        if self.fit is None:
            raise SingularError("no calibration token reached this layer")
        return self.fit.H


def layer_record(
    name: str, q: QuantizedWeight, settings: QuantizeConfig, tokens: int
) -> dict[str, Any]:
    """A layer in the result; `tokens` is how many its Hessian was made from."""
    return {
        "name": name,
        "bits": q.bits,
        "group_size": settings.group_size,
        "relative_error": q.relative_error,
        "weight_error": q.weight_error,
        "damp_percent": q.damp_percent,
        "damp_tried": list(q.damp_tried),
        "tokens": tokens,
        "fallback": q.fallback,
    }


def widths(layers: list[dict[str, Any]]) -> dict[str, str]:
    """For each kind of layer, bits and group sizes from the first block on; none if all agree."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        kind = re.sub(r"\d+(?=\.)", "*", layer["name"])
        found.setdefault(kind, []).append(f"{layer['bits']}/{layer['group_size']}")
    if len({width for each in found.values() for width in each}) < 2:
        return {}
    return {
        kind: ", ".join(f"{width} x{len([*same])}" for width, same in groupby(each))
        for kind, each in found.items()
    }


def join_parts(q: QuantizedWeight, count: int, total: int, ranks: Ranks) -> QuantizedWeight:
    """A weight of `total` rows from the parts that the ranks have solved.

    Args:
        q: this rank's.
        count: how many of its rows count.
        total: rows of the weight.
        ranks: who have the others.
    """
    codes, scales, zeros = (
        ranks.all_gather_rows(part[:count], total) for part in (q.codes, q.scales, q.zeros)
    )
    known = q.relative_error is not None
    sums = [(q.relative_error or 0.0) * q.energy, q.energy]
    sums += [q.weight_error * q.weight_energy, q.weight_energy]
    mine = torch.tensor(sums if count else [0.0] * 4, dtype=torch.float64)
    target_shift, energy, error, weight = ranks.sum(mine).tolist()
    return replace(
        q, codes=codes, scales=scales, zeros=zeros, energy=energy, weight_energy=weight,
        relative_error=(target_shift / energy if energy else 0.0) if known else None,
        weight_error=error / weight if weight else 0.0,
    )  # fmt: skip


def shard_tensors(
    streamed: StreamedModel,
    index: int,
    solved: dict[str, dict[str, torch.Tensor]],
    folded: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """A block's tensors as they go to disk: quantized ones packed, all others as they were.

    Args:
        skeleton: the model.
        index: of the block.
        solved: linear -> suffix -> packed tensor.
        folded: tensors that scales were moved into, by name.
    """
    stems = {
        streamed.checkpoint_name_of[f"{name}.weight"].removesuffix(".weight"): name
        for name in solved
    }
    tensors: dict[str, Any] = {}
    for tensor, info in streamed.block_tensors(index).items():
        stem, _, kind = tensor.rpartition(".")
        if stem in stems and kind == "weight":
            parts = solved[stems[stem]].items()
            tensors |= {f"{stem}.{suffix}": part for suffix, part in parts}
        else:
            tensors |= unquantized_tensors({tensor: folded.get(tensor, info)}, {*stems})
    return tensors


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
            known; see `OutputGradients.weights_of_block`.
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

    @reuse_small_blocks()
    def solve(self, group: InputGroup) -> None:
        """Quantizes the linears of a group whose sums are complete."""
        # Everybody is behind the linears of earlier groups by now.
        self._release(list(self.packed))
        inputs = GroupStatistics(group)
        scaling = self._prescale(group, inputs)
        self.folded.update(scaling.tensors)
        inputs.choose_damping(self._weights(group, scaling))
        for name in group.names:
            settings = self.config.for_module(name)
            if settings is None:
                continue
            linear = self.block.linears[name]
            B, gradients = self._outputs(name) if settings.needs_gradients else (None, 0)
            with timer.phase("solve"):
                q = self._weight(name, scaling.apply(weight_of(linear)), inputs, settings, B)
            with timer.phase("pack"):
                set_weight(linear, scaling.undo(q.dequantize(weight_of(linear).dtype)))
                packed = encode(q, settings).items()
                self.packed[name] = {suffix: part.to(HOST) for suffix, part in packed}
            record = layer_record(name, q, settings, inputs.tokens)
            record |= {"gradients": gradients, "fallback": q.fallback or group.fallback}
            self.layers.append(record | scaling.record(name) | inputs.damping.record(settings))
            self._tell(self.layers[-1])

    def quantize_remaining(self) -> None:
        """Quantizes what no group had: linears the forward never called, or all without calibration."""
        self.solve(InputGroup([name for name in self.block.linears if name not in self.packed]))

    def _prescale(self, group: InputGroup, inputs: GroupStatistics) -> NormScaling:
        """Scales for the group's input, if any; `inputs` becomes that of the scaled weights."""
        if self._prescaler is None or inputs.fit is None:
            return NormScaling()
        with timer.phase("choose"):
            scaling = self._prescaler.search(self.block, group.names, inputs.fit.H)
        for part in (inputs.fit, inputs.held):
            if part is not None and scaling.s is not None:
                part.divide(scaling.s)
        return scaling

    def _weights(
        self, group: InputGroup, scaling: NormScaling
    ) -> Iterator[tuple[torch.Tensor, QuantizeConfig]]:
        """The weights of a group that are to be quantized, and their settings."""
        for name in group.names:
            settings = self.config.for_module(name)
            if settings is not None:
                yield scaling.apply(weight_of(self.block.linears[name])), settings

    def _weight(
        self, name: str, W: torch.Tensor, inputs: GroupStatistics, settings: QuantizeConfig,
        B: torch.Tensor | None,
    ) -> QuantizedWeight:  # fmt: skip
        """One weight, its rows shared out unless they are coupled; a named error where it fails."""
        try:
            if (
                self.ranks.is_single or B is not None
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
        self, W: torch.Tensor, inputs: GroupStatistics, settings: QuantizeConfig, rows: slice | None,
        B: torch.Tensor | None,
    ) -> QuantizedWeight:  # fmt: skip
        """Some rows; rounded to nearest, with the reason recorded, where they cannot be solved."""
        if settings.method == "rtn":
            return round_to_nearest(W, settings)
        try:
            if settings.method == "awq":
                return round_searched(W, inputs.moment(), settings)
            target_shift = inputs.target_shift(W, settings, rows)
            B = None if B is None else B.to(W.device)
            process_group = None if self.ranks.is_single else self.ranks
            return solve(
                W,
                inputs.prepared(settings),
                settings,
                target_shift=target_shift,
                outputs=B,
                process_group=process_group,
            )
        except SingularError as error:
            return round_to_nearest(W, settings, fallback=str(error))
