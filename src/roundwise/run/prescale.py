"""Prescaling in a run: finds activation-aware scales for a group and folds them into its norm.

Only the written tensors are scaled. The running model keeps its norms: its linears get the quantized
weights divided by the scales again, which fit the unscaled input.
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
from roundwise.system.device import HOST


@dataclass(frozen=True)
class NormScaling:
    """Scales of a group's input channels; the default has none and changes nothing."""

    s: torch.Tensor | None = None
    """float64 [in]: multiplies the columns of W and divides the norm's gains."""
    norm: ScalableNorm | None = None
    ratio: float = 0.0
    """Exponent of the activation sizes; see `core.activation_scales`."""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Scaled tensors of the norm, to be written."""

    def apply(self, W: torch.Tensor) -> torch.Tensor:
        """Returns W diag(s) in float32 for W [out, in]; without scales, W itself."""
        return W if self.s is None else (W.to(torch.float64) * self.s).to(torch.float32)

    def undo(self, Q: torch.Tensor) -> torch.Tensor:
        """Returns Q diag(1/s) for Q [out, in], in the dtype of Q."""
        return Q if self.s is None else (Q.to(torch.float64) / self.s).to(Q.dtype)

    def record(self, name: str) -> PrescaleRecord | None:
        """Returns the record of the scales that the linear `name` shares with its norm, if any."""
        if self.norm is None:
            return None
        weight, axis = self.norm.readers[name]
        return PrescaleRecord(
            ratio=self.ratio, norm=self.norm.weight, bias=self.norm.bias, offset=self.norm.offset,
            weight=weight, axis=axis,
        )  # fmt: skip


class Prescaler:
    """Finds scales for groups of linears that read the output of a norm.

    Args:
        streamed: the model.
        config: settings.

    Raises:
        ConfigError: see `scalable_norms`.
    """

    def __init__(self, streamed: StreamedModel, config: QuantizeConfig) -> None:
        self._config, self._checkpoint = config, streamed.checkpoint
        self._norms = {frozenset(n.readers): n for n in scalable_norms(streamed.checkpoint)}

    def issues(self) -> list[str]:
        """Returns a line for each norm that gets no scales because a reader of it is not quantized."""
        issues = []
        for readers in self._norms:
            skipped = sorted(name for name in readers if self._config.for_module(name) is None)
            if 0 < len(skipped) < len(readers):
                others = ", ".join(sorted(readers - set(skipped)))
                issues.append(
                    f"{others} not prescaled: {skipped[0]} has the same input and is not quantized"
                )
        return issues

    def search(self, block: Block, names: Sequence[str], H: torch.Tensor) -> NormScaling:
        """Returns the best scales for linears that read one input; it may be none.

        There are none if no norm is read by exactly these linears, if one of them is not quantized, or
        if no scales reduce the loss.

        Args:
            block: the block of the linears, with its weights loaded.
            names: the linears.
            H: Hessian [in, in] of their input.
        """
        norm = self._norms.get(frozenset(names))
        settings = [self._config.for_module(name) for name in names]
        weights = [
            (weight_of(block.linears[name]), each)
            for name, each in zip(names, settings, strict=True)
            if each is not None
        ]
        if norm is None or len(weights) < len(names):
            return NormScaling()
        try:
            best = search_scales(weights, H)
        except SingularError:  # the solver fails too, and reports it
            return NormScaling()
        if best.ratio == 0.0:
            return NormScaling()
        tensors = self._checkpoint.tensors
        s = norm.storable_scales(tensors[norm.weight].read(), best.s.to(HOST))
        scaled = {
            name: transform.apply(tensors[name].read()).to(tensors[name].read().dtype)
            for name, transform in norm.transforms(s).items()
        }
        return NormScaling(s.to(H.device), norm, best.ratio, scaled)
