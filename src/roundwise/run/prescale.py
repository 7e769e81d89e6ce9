"""Activation-aware scales while a run goes on: found for a group, put into its norm and its weights.

The running model keeps its norms: its linears get what the scaled and quantized weights stand for on the
unscaled input. Only what is written is scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from roundwise.checkpoint.manifest import PrescaleRecord
from roundwise.config import QuantizeConfig
from roundwise.core.activation_scales import search_scales
from roundwise.errors import SingularError
from roundwise.model.blocks import Block, weight_of
from roundwise.model.norm_scaling import ScalableNorm, scalable_norms
from roundwise.model.streamed import StreamedModel
from roundwise.run.held_out_damping import Damping
from roundwise.system.device import HOST


@dataclass(frozen=True)
class NormScaling:
    """Scales of one group's input channels; without `s`, none."""

    s: torch.Tensor | None = None
    """float64 [in]: the columns of W are multiplied by them, the norm's gains divided."""
    norm: ScalableNorm | None = None
    ratio: float = 0.0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """The norm's tensors as they are to be written."""

    def apply(self, W: torch.Tensor) -> torch.Tensor:
        """W diag(s), float32; W itself without scales."""
        return W if self.s is None else (W.to(torch.float64) * self.s).to(torch.float32)

    def undo(self, Q: torch.Tensor) -> torch.Tensor:
        """Q diag(1/s) in the type of Q."""
        return Q if self.s is None else (Q.to(torch.float64) / self.s).to(Q.dtype)

    def record(self, name: str) -> PrescaleRecord | None:
        """The scales that linear `name` shares with its norm; None: it has none."""
        if self.norm is None:
            return None
        weight, axis = self.norm.readers[name]
        return PrescaleRecord(
            ratio=self.ratio, norm=self.norm.weight, bias=self.norm.bias, offset=self.norm.offset,
            weight=weight, axis=axis,
        )  # fmt: skip


class Prescaler:
    """Finds scales for groups of linears that a norm feeds.

    Raises:
        ConfigError: see `scalable_norms`.
    """

    def __init__(self, streamed: StreamedModel, config: QuantizeConfig) -> None:
        self._config, self._checkpoint = config, streamed.checkpoint
        self._norms = {frozenset(n.readers): n for n in scalable_norms(streamed.checkpoint)}

    def issues(self) -> list[str]:
        """A line for each norm that gets no scales because a layer behind it stays as it is."""
        found = []
        for readers in self._norms:
            kept = sorted(name for name in readers if self._config.for_module(name) is None)
            if 0 < len(kept) < len(readers):
                others = ", ".join(sorted(readers - set(kept)))
                found.append(
                    f"{others} not prescaled: {kept[0]} has the same input and stays as it is"
                )
        return found

    def search(self, block: Block, names: Sequence[str], H: torch.Tensor) -> NormScaling:
        """Scales for the linears `names`, which read one input with Hessian H; maybe none.

        None where no norm feeds just these linears, where one of them is left as it is, and where no
        scales round better than none.
        """
        norm = self._norms.get(frozenset(names))
        settings = [self._config.for_module(name) for name in names]
        open_damping = Damping()  # chosen later, on the scaled input
        weights = [
            (weight_of(block.linears[name]), open_damping.settle(each))
            for name, each in zip(names, settings, strict=True)
            if each is not None
        ]
        if norm is None or len(weights) < len(names):
            return NormScaling()
        try:
            found = search_scales(weights, H)
        except SingularError:  # the solver meets it too, and says so
            return NormScaling()
        if found.ratio == 0.0:
            return NormScaling()
        tensors = self._checkpoint.tensors
        s = norm.storable(tensors[norm.weight].read(), found.s.to(HOST))
        changed = {
            name: change.rows(tensors[name].read()).to(tensors[name].read().dtype)
            for name, change in norm.changes(s).items()
        }
        return NormScaling(s.to(H.device), norm, found.ratio, changed)
