"""Computes a mixture of experts with one linear layer per expert and projection.

Transformers keeps the experts of a block fused in two tensors with an axis for the experts. Files hold
one matrix per expert and projection, in most families, and always in the GPTQ format. `LinearExperts`
replaces transformers' module and computes the same from separate layers.

If one tensor holds gate and up, its first half is called "gate" and its second half "up", as in
GPTQModel, even if the model interleaves the rows (GPT-OSS): concatenated again, they are what its gate
expects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: Name of an expert's projection in files (Mixtral's names, then all other families') -> its role.
PROJECTION_ROLES = {
    "w1": "gate", "w3": "up", "w2": "down",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip

#: (expert, indices of the tokens sent to it) in order of experts; None: all tokens, without indexing.
ExpertDispatch = Iterable[tuple[int, torch.Tensor | None]]


@dataclass(frozen=True)
class ProjectionNames:
    """Names of an expert's projections in the files, by role."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def of_role(self, role: str) -> str:
        """Returns the name of the projection with a role: gate, up or down."""
        return {"gate": self.gate, "up": self.up, "down": self.down}[role]


def parse_expert_name(name: str) -> tuple[str, tuple[int, str]] | None:
    """Splits the name of an expert's layer.

    Args:
        name: name of a layer, such as model.layers.0.mlp.experts.3.up_proj.

    Returns:
        (module of all experts, (expert, projection)), such as (model.layers.0.mlp.experts,
        (3, up_proj)); None if the name does not belong to an expert.
    """
    match = re.fullmatch(r"(.+)\.(\d+)\.(\w+)", name)
    if match is None or match[3] not in PROJECTION_ROLES:
        return None
    return match[1], (int(match[2]), match[3])


def is_fused_experts(module: nn.Module) -> bool:
    """Tells whether a module holds all experts in one tensor per projection, as transformers does."""
    if not isinstance(getattr(module, "down_proj", None), nn.Parameter):
        return False
    return hasattr(module, "_apply_gate") or is_batched_experts(module)


def is_batched_experts(module: nn.Module) -> bool:
    """Tells whether a module's own forward multiplies all experts at once with `torch.bmm` (Llama 4)."""
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    if not all(isinstance(W, nn.Parameter) and W.ndim == 3 for W in weights):
        return False
    names = type(module).forward.__code__.co_names
    return "bmm" in names and not hasattr(module, "_apply_gate")


def is_transposed(fused: nn.Module) -> bool:
    """Tells whether a module of fused experts stores each matrix as [in, out]."""
    return is_batched_experts(fused) or bool(getattr(fused, "is_transposed", False))


def expert_roles(module: nn.Module) -> tuple[str, ...]:
    """Returns the roles of an expert's projections, in the order of computation."""
    return ("gate", "up", "down") if getattr(module, "has_gate", True) else ("up", "down")


def expert_count(fused: nn.Module) -> int:
    """Returns the number of experts in a module of fused experts."""
    return len(fused.get_parameter("down_proj"))


def projection_shape(fused: nn.Module, role: str) -> tuple[int, int]:
    """Returns (out_features, in_features) of one expert's projection.

    Args:
        fused: module of fused experts.
        role: gate, up or down.
    """
    _, hidden, inner = fused.get_parameter("down_proj").shape
    if is_transposed(fused):
        hidden, inner = inner, hidden
    return (hidden, inner) if role == "down" else (inner, hidden)


def separate_experts(original: nn.Module, layers: dict[tuple[int, str], nn.Module]) -> nn.Module:
    """Returns a module that computes what a module of fused experts does, with one layer per projection.

    Args:
        original: the module of fused experts.
        layers: all layers, by expert and name of the projection.
    """
    kind = BatchedExperts if is_batched_experts(original) else LinearExperts
    return kind(original, layers)


def _add_layers(module: nn.Module, layers: dict[tuple[int, str], nn.Module]) -> None:
    """Adds each expert's layers to a module, by expert and in order of computation."""
    roles = list(dict.fromkeys(PROJECTION_ROLES.values()))
    for (expert, name), layer in sorted(
        layers.items(), key=lambda item: (item[0][0], roles.index(PROJECTION_ROLES[item[0][1]]))
    ):
        if str(expert) not in module._modules:
            module.add_module(str(expert), nn.Module())
        module.get_submodule(str(expert)).add_module(name, layer)


def _layer_of(module: nn.Module, expert: int, role: str) -> Any:
    """Returns the layer of one expert with a role: gate, up or down."""
    layers = module.get_submodule(str(expert))._modules
    return next(layer for name, layer in layers.items() if PROJECTION_ROLES[name] == role)


@dataclass(frozen=True, eq=False)
class BatchedWeights:
    """Stands for fused weights in `torch.bmm`: calls each expert's layers with its tokens instead."""

    module: nn.Module
    """The module of experts with its layers."""
    roles: tuple[str, ...]
    """Roles of the layers whose outputs are concatenated."""
    shape: torch.Size
    """Shape of the fused weights: [experts, in, out]."""

    @classmethod
    def __torch_function__(
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        """Returns x W [experts, n, out] of tokens x [experts, n, in] for `torch.bmm(x, W)`."""
        if func is not torch.bmm or kwargs:
            raise TypeError(f"fused experts are separate layers here: {func} cannot be computed")
        x, weights = args
        outputs = [
            torch.cat([_layer_of(weights.module, e, role)(part) for role in weights.roles], dim=-1)
            for e, part in enumerate(x.unbind())
        ]
        return torch.stack(outputs)


class BatchedExperts(nn.Module):
    """Mixture of experts whose original forward is kept; only its fused weights are separate layers.

    Args:
        original: the module of fused experts, see `is_batched_experts`.
        layers: all layers, by expert and name of the projection.
    """

    _is_hf_initialized = True

    def __init__(self, original: nn.Module, layers: dict[tuple[int, str], nn.Module]) -> None:
        super().__init__()
        _copy_settings(self, original)
        _add_layers(self, layers)
        for name, roles in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            weights = BatchedWeights(self, roles, original.get_parameter(name).shape)
            setattr(self, name, weights)
        self._forward = type(original).forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the original module's forward computes."""
        return self._forward(self, *args, **kwargs)


def _copy_settings(module: nn.Module, original: nn.Module) -> None:
    """Gives a module the settings and submodules of another one."""
    for key, value in vars(original).items():
        if not key.startswith("_") and key not in vars(module):
            setattr(module, key, value)
    for key, child in original.named_children():
        module.add_module(key, child)


def dispatch_to_all(
    experts: LinearExperts, x: torch.Tensor, _index: torch.Tensor, *, as_one: bool
) -> ExpertDispatch:
    """Sends every token to every expert, whatever the router chose.

    Args:
        experts: the module of experts.
        x: tokens [n, hidden].
        as_one: all experts read the same tensor instead of copies, so that they can share a Hessian.
    """
    rows = None if as_one else torch.arange(len(x), device=x.device)
    return [(expert, rows) for expert in range(experts.count)]


class LinearExperts(nn.Module):
    """Mixture of experts that computes each projection of each expert with its own linear layer.

    Args:
        original: the module of fused experts; its activation, gate and settings are reused.
        layers: all layers, by expert and name of the projection.
    """

    #: Replaces `dispatch_by_router` during calibration: (hidden states, the router's choice) ->
    #: dispatch, possibly of more tokens than the router chose; those do not change the output.
    dispatch: Callable[[torch.Tensor, torch.Tensor], ExpertDispatch] | None = None
    #: Tells transformers not to initialize it: some of its functions go by the names of classes.
    _is_hf_initialized = True

    def __init__(self, original: nn.Module, layers: dict[tuple[int, str], nn.Module]) -> None:
        super().__init__()
        self.count, self.roles = expert_count(original), expert_roles(original)
        self.has_post_expert_norm: bool = getattr(original, "has_post_expert_norm", False)
        _copy_settings(self, original)
        self._gate = type(original)._apply_gate  # type: ignore[attr-defined]
        _add_layers(self, layers)

    def projections(self) -> list[tuple[int, str]]:
        """Returns (expert, role) of each layer, in order of computation."""
        return [(expert, role) for expert in range(self.count) for role in self.roles]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Returns the weighted sum of the experts' outputs, [n, hidden].

        Args:
            hidden_states: tokens [n, hidden].
            top_k_index: the k experts that the router chose for each token, [n, k].
            top_k_weights: the weights of these experts, [n, k].
        """
        out = torch.zeros_like(hidden_states)
        dispatch = self.dispatch or self.dispatch_by_router
        for expert, rows in dispatch(hidden_states, top_k_index):
            # At most one of a token's k choices is this expert, so the sum has at most one term.
            weight = (top_k_weights * (top_k_index == expert)).sum(-1, keepdim=True)
            if rows is None:
                out += (self.run_expert(expert, hidden_states) * weight).to(out.dtype)
            else:
                y = self.run_expert(expert, hidden_states[rows]) * weight[rows]
                out.index_add_(0, rows, y.to(out.dtype))
        return out

    def dispatch_by_router(self, _: torch.Tensor, top_k_index: torch.Tensor) -> ExpertDispatch:
        """Yields each chosen expert with its tokens, from the router's choice [n, k]."""
        for expert in torch.unique(top_k_index).tolist():
            if expert < self.count:  # the index `count` means no expert
                yield expert, (top_k_index == expert).any(-1).nonzero()[:, 0]

    def run_expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Returns the output [n, hidden] of one expert for tokens x [n, hidden]."""
        if "gate" in self.roles:
            both = [self.layer(expert, role)(x) for role in ("gate", "up")]
            inner: torch.Tensor = self._gate(self, torch.cat(both, dim=-1))
        else:
            inner = self.get_submodule("act_fn")(self.layer(expert, "up")(x))
        y: torch.Tensor = self.layer(expert, "down")(inner)
        return self.get_submodule("post_expert_norm")(y) if self.has_post_expert_norm else y

    def layer(self, expert: int, role: str) -> Any:
        """Returns the layer of one expert with a role: gate, up or down."""
        return _layer_of(self, expert, role)
