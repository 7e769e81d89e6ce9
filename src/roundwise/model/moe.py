"""Mixtures of experts as linear layers: one for each expert and projection.

Transformers keeps the experts of a block as two tensors with an axis for the experts. Files hold one
matrix per expert and projection, in most families, and always in the GPTQ format. `LinearExperts` takes
the place of transformers' module and computes the same from the layers that it is given.

Where one tensor holds gate and up, its first half is the "gate" and its second half the "up", as others
have it too (GPTQModel), even if the model takes the rows in turns (GPT-OSS): put together again, they
are what the model's own gate expects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

#: Names of an expert's projections in files, by what they do: Mixtral's, and everybody else's.
ROLES = {
    "w1": "gate", "w3": "up", "w2": "down",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
#: The other way round, where the files do not say: everybody else's.
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

#: For some experts, in order: which tokens pass; None: all of them, as they came.
Visits = Iterable[tuple[int, torch.Tensor | None]]


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


def roles_of(module: nn.Module) -> tuple[str, ...]:
    """The projections of an expert, in the order in which they are computed."""
    return ("gate", "up", "down") if getattr(module, "has_gate", True) else ("up", "down")


def count_of(fused: nn.Module) -> int:
    """How many experts a module of fused experts holds."""
    return len(fused.get_parameter("down_proj"))


def shape_of(fused: nn.Module, role: str) -> tuple[int, int]:
    """Output and input channels of one expert's projection."""
    _, hidden, inner = fused.get_parameter("down_proj").shape
    if getattr(fused, "is_transposed", False):
        hidden, inner = inner, hidden
    return (hidden, inner) if role == "down" else (inner, hidden)


def visit_all(
    experts: LinearExperts, x: torch.Tensor, _index: torch.Tensor, *, as_one: bool
) -> Visits:
    """Every token passes every expert, whatever the router chose.

    Args:
        experts: the module.
        x: tokens [n, hidden].
        as_one: experts are given the same tensor, not copies, so that they can share a Hessian.
    """
    own = None if as_one else torch.arange(len(x), device=x.device)
    return [(expert, own) for expert in range(experts.count)]


class LinearExperts(nn.Module):
    """The product of tokens with the experts that the router chose for them.

    Args:
        original: the module of fused experts; what it knows of activation and gate is taken over.
        layers: by expert and name of the projection, complete.
    """

    #: From hidden states and the router's choice: more visits than the router asks for. What a visitor
    #: computes that the router did not ask for counts for nothing in the result.
    visits: Callable[[torch.Tensor, torch.Tensor], Visits] | None = None

    def __init__(self, original: nn.Module, layers: dict[tuple[int, str], nn.Module]) -> None:
        super().__init__()
        self.count, self.roles = count_of(original), roles_of(original)
        self.has_post_expert_norm: bool = getattr(original, "has_post_expert_norm", False)
        for key, value in vars(original).items():
            if not key.startswith("_") and key not in vars(self):
                setattr(self, key, value)
        for key, child in original.named_children():
            self.add_module(key, child)
        self._gate = type(original)._apply_gate  # type: ignore[attr-defined]
        order = {(e, role): place for place, (e, role) in enumerate(self.places())}
        for (expert, name), layer in sorted(
            layers.items(), key=lambda item: order[item[0][0], ROLES[item[0][1]]]
        ):
            if str(expert) not in self._modules:
                self.add_module(str(expert), nn.Module())
            self.get_submodule(str(expert)).add_module(name, layer)

    def places(self) -> list[tuple[int, str]]:
        """(expert, role) of each layer, in order."""
        return [(expert, role) for expert in range(self.count) for role in self.roles]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [n, hidden], their experts and these experts' weights [n, k] -> [n, hidden]."""
        out = torch.zeros_like(hidden_states)
        visits = self.visits or self.routed
        for expert, rows in visits(hidden_states, top_k_index):
            # Of a token's k choices one at most is this expert, so that nothing is added up here.
            weight = (top_k_weights * (top_k_index == expert)).sum(-1, keepdim=True)
            if rows is None:
                out += (self.expert(expert, hidden_states) * weight).to(out.dtype)
            else:
                answer = self.expert(expert, hidden_states[rows]) * weight[rows]
                out.index_add_(0, rows, answer.to(out.dtype))
        return out

    def routed(self, _: torch.Tensor, top_k_index: torch.Tensor) -> Visits:
        """The visits that the router asks for."""
        for expert in torch.unique(top_k_index).tolist():
            if expert < self.count:  # the number after the last stands for none
                yield expert, (top_k_index == expert).any(-1).nonzero()[:, 0]

    def expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """What one expert makes of tokens [n, hidden]."""
        if "gate" in self.roles:
            both = [self.layer(expert, role)(x) for role in ("gate", "up")]
            inner: torch.Tensor = self._gate(self, torch.cat(both, dim=-1))
        else:
            inner = self.get_submodule("act_fn")(self.layer(expert, "up")(x))
        y: torch.Tensor = self.layer(expert, "down")(inner)
        return self.get_submodule("post_expert_norm")(y) if self.has_post_expert_norm else y

    def layer(self, expert: int, role: str) -> Any:
        """The layer of one expert."""
        layers = self.get_submodule(str(expert))._modules
        return next(layer for name, layer in layers.items() if ROLES[name] == role)
