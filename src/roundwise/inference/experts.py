"""Mixtures of experts from packed weights.

Transformers keeps the experts of a block as two tensors with an axis for the experts; files in the GPTQ
format hold one linear layer per expert and projection, which take the place of these tensors.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from roundwise.errors import CheckpointError
from roundwise.inference.qlinear import QuantLinear

#: Names of an expert's projections in files, by what they do: Mixtral's, and everybody else's.
ROLES = {
    "w1": "gate", "w3": "up", "w2": "down",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
#: What sets a class of experts apart from the one that is computed here.
UNUSUAL = ("is_transposed", "has_bias", "has_post_expert_norm")


def split_name(name: str) -> tuple[str, tuple[int, str]] | None:
    """The experts' module, and number and projection of one's layer; None if it is no such name."""
    match = re.fullmatch(r"(.+)\.(\d+)\.(\w+)", name)
    if match is None or match[3] not in ROLES:
        return None
    return match[1], (int(match[2]), match[3])


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds all experts in one tensor per projection, as transformers does."""
    return isinstance(getattr(module, "down_proj", None), nn.Parameter) and hasattr(
        module, "_apply_gate"
    )


def shape_of(module: nn.Module, projection: str) -> tuple[int, int]:
    """Output and input channels of one expert's projection."""
    _, hidden, inner = module.get_parameter("down_proj").shape
    return (hidden, inner) if ROLES[projection] == "down" else (inner, hidden)


class PackedExperts(nn.Module):
    """The product of tokens with the experts that the router chose for them.

    Args:
        name: of the module, for messages.
        original: the module of fused experts; what it knows of activation and gate is taken over.
        layers: by expert and name of the projection.

    Raises:
        CheckpointError: experts or projections are missing, or the class computes in another way.
    """

    def __init__(
        self, name: str, original: nn.Module, layers: dict[tuple[int, str], QuantLinear]
    ) -> None:
        super().__init__()
        _check(name, original, layers)
        self.has_gate: bool = getattr(original, "has_gate", True)
        for key, value in vars(original).items():
            if not key.startswith("_") and key not in vars(self):
                setattr(self, key, value)
        for key, child in original.named_children():
            self.add_module(key, child)
        self._gate = type(original)._apply_gate  # type: ignore[attr-defined]
        for (expert, projection), layer in sorted(layers.items()):
            if str(expert) not in self._modules:
                self.add_module(str(expert), nn.Module())
            self.get_submodule(str(expert)).add_module(projection, layer)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [n, hidden], their experts and these experts' weights [n, k] -> [n, hidden]."""
        out = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if str(expert) not in self._modules:
                continue  # the number after the last stands for none
            rows, place = torch.where(top_k_index == expert)
            inner = self._inner(expert, hidden_states[rows])
            answer = self._layer(expert, "down")(inner) * top_k_weights[rows, place, None]
            out.index_add_(0, rows, answer.to(out.dtype))
        return out

    def _inner(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        up = self._layer(expert, "up")(x)
        if self.has_gate:
            gate = self._layer(expert, "gate")(x)
            inner: torch.Tensor = self._gate(self, torch.cat([gate, up], dim=-1))
        else:
            inner = self.get_submodule("act_fn")(up)
        return inner

    def _layer(self, expert: int, role: str) -> Any:
        layers = self.get_submodule(str(expert))._modules
        return next(layer for name, layer in layers.items() if ROLES[name] == role)


def _check(name: str, original: nn.Module, layers: dict[tuple[int, str], QuantLinear]) -> None:
    if any(getattr(original, flag, False) for flag in UNUSUAL) or not getattr(
        original, "is_concatenated", True
    ):
        raise CheckpointError(
            f"{name}: experts of class {type(original).__name__} cannot be computed from packed weights"
        )
    count = len(original.get_parameter("down_proj"))
    wanted = {"up", "down"} | ({"gate"} if getattr(original, "has_gate", True) else set())
    for expert in range(count):
        roles = {ROLES[projection] for number, projection in layers if number == expert}
        if roles != wanted:
            raise CheckpointError(
                f"{name}.{expert} has no quantized {', '.join(sorted(wanted - roles))} projection: "
                "experts of a block are quantized all or none"
            )
    if len(layers) != count * len(wanted):
        raise CheckpointError(f"{name}: the files hold more than the model's {count} experts")
