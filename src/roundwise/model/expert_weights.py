"""Gives access to each expert's weights separately, however a checkpoint stores them.

Most families store one matrix per expert and projection. Some store what transformers computes with: one
tensor for all experts with gate and up in one, sometimes transposed or interleaved.
`install_linear_experts` detects which, puts separate layers into the model and splits fused tensors into
`ExpertSlice`s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from roundwise.checkpoint.reader import Checkpoint, CheckpointView, TensorInfo
from roundwise.checkpoint.transformed_view import ComputedInfo, stored_as
from roundwise.errors import CheckpointError
from roundwise.model.conversions import Conversions
from roundwise.model.moe import (
    PROJECTION_ROLES,
    LinearExperts,
    ProjectionNames,
    expert_count,
    expert_roles,
    is_fused_experts,
    is_transposed,
    parse_expert_name,
    projection_shape,
    separate_experts,
)

#: Path of each module of experts -> names of its projections.
ExpertLayout = dict[str, ProjectionNames]


@dataclass(frozen=True)
class ExpertSlice(ComputedInfo):
    """One expert's matrix or bias within a fused tensor of all experts; it is copied when it is read."""

    @classmethod
    def from_whole(
        cls,
        whole: TensorInfo,
        whole_name: str,
        expert: int,
        *,
        half: int | None,
        transposed: bool,
    ) -> ExpertSlice:
        """Returns a slice of a fused tensor; shape and type follow from the tensor.

        Args:
            whole: the fused tensor, [experts, out, in] ([experts, in, out] if transposed); biases are
                [experts, out].
            whole_name: its name.
            expert: index of the expert.
            half: rows of a fused gate and up: 0 for the gate, 1 for up; None: all rows.
            transposed: the matrix is stored as [in, out].
        """
        shape = list(whole.shape[1:])
        if transposed:
            shape.reverse()
        if half is not None:
            shape[0] //= 2

        def compute() -> torch.Tensor:
            matrix = whole.rows(expert, 1).read()[0]
            matrix = matrix.T if transposed else matrix
            return matrix if half is None else matrix[half * shape[0] :][: shape[0]]

        nbytes = whole.nbytes // whole.shape[0] // (1 if half is None else 2)
        origins = whole.origins if isinstance(whole, ComputedInfo) else {}
        return cls(
            whole.path, whole.dtype, tuple(shape), whole.start, nbytes, compute,
            origins or {whole_name: whole}, stored_as=stored_as(whole),
        )  # fmt: skip


def unquantized_tensors(tensors: Mapping[str, Any], quantized: set[str]) -> dict[str, Any]:
    """Returns the tensors to write beside the quantized layers: as the files hold them, if possible.

    Tensors that were split or converted while reading are written under the names and with the bytes
    that they had, unless a layer made of the same tensors is quantized.

    Args:
        tensors: tensors of a checkpoint, or some of them, by name.
        quantized: names of the quantized layers, whose weights are left out.
    """
    used = {
        origin
        for name, info in tensors.items()
        if isinstance(info, ComputedInfo) and name.rpartition(".")[0] in quantized
        for origin in info.origins
    }
    unquantized: dict[str, Any] = {}
    for name, info in tensors.items():
        stem, _, kind = name.rpartition(".")
        if stem in quantized and kind == "weight":
            continue
        if isinstance(info, ComputedInfo) and info.origins and not used & {*info.origins}:
            unquantized |= info.origins
        else:
            unquantized[name] = info
    return unquantized


def install_linear_experts(
    model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[Checkpoint, ExpertLayout]:
    """Puts separate layers into a model for every module of experts that the checkpoint stores.

    Args:
        model: a model on the meta device; it is changed.
        checkpoint: its checkpoint.

    Returns:
        The checkpoint with one tensor per expert and projection, and the layout with which
        `replace_fused_experts` does the same to another model of the same config.

    Raises:
        CheckpointError: the shape of a fused tensor differs from the model's.
    """
    fused = {name: module for name, module in model.named_modules() if is_fused_experts(module)}
    if not fused:
        return checkpoint, {}
    layout: ExpertLayout = {}
    fused_keys: dict[str, dict[str, str]] = {}  # module -> parameter -> name in the checkpoint
    for key, (path, part) in _expert_tensors(model, checkpoint, lambda path: path in fused):
        if isinstance(part, str):
            fused_keys.setdefault(path, {})[part] = key
        else:
            names = layout.get(path, ProjectionNames())
            layout[path] = replace(names, **{PROJECTION_ROLES[part[1]]: part[1]})
    tensors = dict(checkpoint.tensors)
    for path, keys in fused_keys.items():
        if path not in layout and {*_fused_parameters(fused[path])} <= {*keys}:
            layout[path] = ProjectionNames()
            for parameter, key in keys.items():
                del tensors[key]
                tensors |= _slice_experts(
                    path, fused[path], parameter, key, checkpoint.tensors[key]
                )
    replace_fused_experts(model, layout)
    is_split = tensors.keys() != checkpoint.tensors.keys()
    return (CheckpointView(checkpoint, tensors) if is_split else checkpoint), layout


def replace_fused_experts(model: nn.Module, layout: ExpertLayout) -> None:
    """Replaces modules of fused experts by separate layers on the meta device.

    Args:
        model: a model on the meta device; it is changed.
        layout: modules to replace, with the names of their projections.
    """
    for path, names in layout.items():
        original = model.get_submodule(path)
        dtype = original.get_parameter("down_proj").dtype
        layers: dict[tuple[int, str], nn.Module] = {}
        for expert in range(expert_count(original)):
            for role in expert_roles(original):
                rows, columns = projection_shape(original, role)
                layers[expert, names.of_role(role)] = nn.Linear(
                    columns, rows, bias=getattr(original, "has_bias", False),
                    device="meta", dtype=dtype,
                )  # fmt: skip
        model.set_submodule(path, separate_experts(original, layers).train(original.training))


def router_linears(block: nn.Module) -> dict[str, str]:
    """Returns the linears of a block that choose or weight experts, by name, and what they are.

    They are siblings of the experts' module, or below one, with one output per expert or a single one.
    """
    routers = {}
    experts_of = {name: m for name, m in block.named_modules() if isinstance(m, LinearExperts)}
    for path, experts in experts_of.items():
        parent = path.rpartition(".")[0]
        for name, module in block.get_submodule(parent).named_modules(prefix=parent):
            inside = any(name == other or name.startswith(f"{other}.") for other in experts_of)
            if isinstance(module, nn.Linear) and not inside:
                if module.out_features == experts.count:
                    routers[name] = "a router: it chooses the experts of a token"
                elif module.out_features == 1:
                    routers[name] = "a gate: it weights the shared expert"
    return routers


@dataclass(frozen=True)
class FusedExpertTensor:
    """A fused tensor of all experts, assembled from the experts' own tensors."""

    name: str
    members: list[list[str]]
    """For each expert: the name of its tensor, or the names of gate and up."""
    transposed: bool
    """The fused tensor stores each matrix as [in, out]."""

    def assemble(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Returns the fused tensor [experts, …].

        Args:
            read: returns the tensor of a member.
        """
        matrices = []
        for names in self.members:
            matrix = torch.cat([read(name) for name in names])
            matrices.append(matrix.T if self.transposed else matrix)
        return torch.stack(matrices)


def fused_expert_tensors(
    model: PreTrainedModel, layer_names: Iterable[str]
) -> list[FusedExpertTensor]:
    """Returns the fused tensors to assemble for families whose dense files store experts only fused.

    Args:
        model: model with transformers' own modules of experts.
        layer_names: names of the layers of a checkpoint that stores experts separately.
    """
    conversions = Conversions(model)
    layers_of: dict[str, dict[tuple[int, str], str]] = {}  # module -> (expert, role) -> layer
    for layer_name in layer_names:
        name, pattern = conversions.place(f"{layer_name}.weight")
        # A converter means that transformers itself reads separate experts of this family.
        parsed = parse_expert_name(name.removesuffix(".weight")) if pattern is None else None
        if parsed is not None:
            path, (expert, projection) = parsed
            layers_of.setdefault(path, {})[expert, PROJECTION_ROLES[projection]] = layer_name
    fused = {name: module for name, module in model.named_modules() if is_fused_experts(module)}
    base = f"{model.base_model_prefix}."
    fused_tensors = []
    for path, layers in layers_of.items():
        module = fused.get(path) or fused.get(base + path)
        if module is None:
            continue
        for parameter in _fused_parameters(module):
            is_bias = parameter.endswith("_bias")
            roles, kind = _roles_of_parameter(parameter), "bias" if is_bias else "weight"
            members = [
                [f"{layers[expert, role]}.{kind}" for role in roles]
                for expert in range(expert_count(module))
            ]
            fused_tensors.append(
                FusedExpertTensor(
                    f"{path}.{parameter}", members,
                    transposed=is_transposed(module) and not is_bias,
                )
            )  # fmt: skip
    return fused_tensors


def _expert_tensors(
    model: PreTrainedModel, checkpoint: Checkpoint, is_experts: Callable[[str], bool]
) -> Iterator[tuple[str, tuple[str, str | tuple[int, str]]]]:
    """Yields the tensors that belong to experts, with their place in the model.

    Args:
        model: the model.
        checkpoint: its checkpoint.
        is_experts: tells whether a path is a module of fused experts.

    Yields:
        (name in the checkpoint, (module of experts, place)); place is the name of a fused parameter or
        (expert, projection) of a separate one.
    """
    conversions = Conversions(model)
    for key in checkpoint.tensors:
        for full_name in conversions.candidates(key):
            path, _, parameter = full_name.rpartition(".")
            parsed = parse_expert_name(path) if parameter in ("weight", "bias") else None
            if parsed is not None and is_experts(parsed[0]):
                yield key, parsed
                break
            if is_experts(path):
                yield key, (path, parameter)
                break


def _fused_parameters(fused: nn.Module) -> list[str]:
    """Returns the names of the parameters that hold the layers of all experts."""
    weights = ["gate_up_proj" if "gate" in expert_roles(fused) else "up_proj", "down_proj"]
    has_bias = getattr(fused, "has_bias", False)
    return [*weights, *(f"{name}_bias" for name in weights if has_bias)]


def _roles_of_parameter(parameter: str) -> tuple[str, ...]:
    """Returns the roles of the projections that a parameter of `_fused_parameters` holds."""
    stem = parameter.removesuffix("_bias")
    return {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}[stem]


def _slice_experts(
    path: str, fused: nn.Module, parameter: str, key: str, whole: TensorInfo
) -> Iterator[tuple[str, TensorInfo]]:
    """Yields the slices of a tensor of all experts by name; other tensors of the module unchanged.

    Args:
        path: name of the module of experts.
        fused: the module.
        parameter: name of the tensor in the module.
        key: name of the tensor in the checkpoint.
        whole: the tensor.

    Raises:
        CheckpointError: its shape differs from the model's, transposed or not.
    """
    if parameter not in _fused_parameters(fused):
        yield key, whole
        return
    expected = tuple(fused.get_parameter(parameter).shape)
    transposed = is_transposed(fused) and len(expected) == 3
    if whole.shape != expected:
        if whole.shape != (expected[0], *reversed(expected[1:])):
            raise CheckpointError(
                f"tensor {key} has shape {list(whole.shape)}; the model's config requires "
                f"{list(expected)}"
            )
        transposed = not transposed
    prefix = key.removesuffix(f".{parameter}") if key.endswith(f".{parameter}") else path
    kind = "bias" if parameter.endswith("_bias") else "weight"
    roles, names = _roles_of_parameter(parameter), ProjectionNames()
    for expert in range(whole.shape[0]):
        for half, role in enumerate(roles):
            yield f"{prefix}.{expert}.{names.of_role(role)}.{kind}", ExpertSlice.from_whole(
                whole, key, expert, transposed=transposed, half=half if len(roles) == 2 else None,
            )  # fmt: skip
