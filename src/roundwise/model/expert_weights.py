"""Experts of a checkpoint as matrices of their own, whichever way its files hold them.

Most families store a matrix per expert and projection; some store what transformers computes with: one
tensor for all experts, gate and up in one, at times transposed or interleaved. `install_linear_experts` finds
out which, puts `LinearExperts` into the model, and shows tensors that hold all experts as their parts.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from roundwise.checkpoint.reader import CHUNK, Checkpoint, CheckpointView, TensorInfo
from roundwise.errors import CheckpointError
from roundwise.model.moe import (
    NAMES,
    ROLES,
    LinearExperts,
    count_of,
    is_fused,
    roles_of,
    shape_of,
    split_name,
)

#: Path of a module of experts -> name of each projection, by role.
Layout = dict[str, dict[str, str]]


@dataclass(frozen=True)
class ExpertSlice(TensorInfo):
    """One expert's matrix or bias in a tensor that holds those of all; copied out when it is read."""

    whole: TensorInfo
    whole_name: str
    expert: int
    half: int | None
    """0: the gate's rows of gate and up, 1: up's; None: all rows."""
    transposed: bool
    """The file has it as [in, out]."""

    @classmethod
    def of(cls, whole: TensorInfo, whole_name: str, expert: int, **layout: Any) -> ExpertSlice:
        """The part with this layout; size and type follow from the whole."""
        shape = list(whole.shape[1:])
        if layout["transposed"]:
            shape.reverse()
        if layout["half"] is not None:
            shape[0] //= 2
        nbytes = whole.nbytes // whole.shape[0] // (1 if layout["half"] is None else 2)
        return cls(
            whole.path, whole.dtype, tuple(shape), whole.start, nbytes,
            whole=whole, whole_name=whole_name, expert=expert, **layout,
        )  # fmt: skip

    def memory_mapped(self, *, aligned: bool) -> tuple[torch.Tensor, mmap.mmap | None]:
        """A copy of the part; there is no map of it."""
        part = self.whole.rows(self.expert, 1).read()[0]
        if self.transposed:
            part = part.T
        if self.half is not None:
            part = part[self.half * self.shape[0] :][: self.shape[0]]
        return part.clone(memory_format=torch.contiguous_format), None

    def prefetch(self) -> None:
        """As `TensorInfo.prefetch`, of its expert."""
        self.whole.rows(self.expert, 1).prefetch()

    def rows(self, start: int, count: int) -> TensorInfo:
        """Not to be had: a part's rows have no place of their own in the file."""
        raise CheckpointError(f"rows of a part of {self.whole_name} cannot be read alone")

    def chunks(self) -> Iterator[bytes]:
        """The part's bytes, a few MB at a time."""
        data = self.read().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK):
            yield bytes(data[start : start + CHUNK])


def unquantized_tensors(tensors: Mapping[str, Any], quantized: set[str]) -> dict[str, Any]:
    """What is written beside the quantized layers: experts that stay are put back into one tensor.

    Args:
        tensors: of a checkpoint, or some of them.
        quantized: names of layers whose weights are not wanted.
    """
    found: dict[str, Any] = {}
    for name, info in tensors.items():
        stem, _, kind = name.rpartition(".")
        if stem in quantized and kind == "weight":
            continue
        if isinstance(info, ExpertSlice) and stem not in quantized:
            found[info.whole_name] = info.whole
        else:
            found[name] = info
    return found


def install_linear_experts(
    model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[Checkpoint, Layout]:
    """Puts `LinearExperts` into the model wherever the checkpoint's experts can be told apart.

    Returns:
        The checkpoint with a tensor per expert and projection, and what `replace_fused_experts` needs to know to do
        the same to another model of the kind.

    Raises:
        CheckpointError: a tensor of all experts has another shape than the model's.
    """
    fused = {name: module for name, module in model.named_modules() if is_fused(module)}
    if not fused:
        return checkpoint, {}
    layout: Layout = {}
    wholes: dict[str, dict[str, str]] = {}
    for key, name in _renamed(model, checkpoint, lambda path: path in fused):
        path, part = name
        if isinstance(part, str):
            wholes.setdefault(path, {})[part] = key
        else:
            layout.setdefault(path, {**NAMES})[ROLES[part[1]]] = part[1]
    tensors = dict(checkpoint.tensors)
    for path, keys in wholes.items():
        if path not in layout and {*_wholes(fused[path])} <= {*keys}:
            layout[path] = {**NAMES}
            for parameter, key in keys.items():
                del tensors[key]
                tensors |= _parts(path, fused[path], parameter, key, checkpoint.tensors[key])
    replace_fused_experts(model, layout)
    split = tensors.keys() != checkpoint.tensors.keys()
    return (CheckpointView(checkpoint, tensors) if split else checkpoint), layout


def replace_fused_experts(model: nn.Module, layout: Layout) -> None:
    """Puts `LinearExperts` into a model on the meta device."""
    for path, names in layout.items():
        original = model.get_submodule(path)
        dtype = original.get_parameter("down_proj").dtype
        layers: dict[tuple[int, str], nn.Module] = {}
        for expert in range(count_of(original)):
            for role in roles_of(original):
                rows, columns = shape_of(original, role)
                layers[expert, names[role]] = nn.Linear(
                    columns, rows, bias=getattr(original, "has_bias", False),
                    device="meta", dtype=dtype,
                )  # fmt: skip
        model.set_submodule(path, LinearExperts(original, layers).train(original.training))


def routers_of(block: nn.Module) -> dict[str, str]:
    """Linears that choose or weigh experts, by name in the block -> what they are.

    They stand beside the experts, not in them, and have an output for each expert, or just one.
    """
    found = {}
    paths = {name: m for name, m in block.named_modules() if isinstance(m, LinearExperts)}
    for path, experts in paths.items():
        parent = path.rpartition(".")[0]
        for name, module in block.get_submodule(parent).named_modules(prefix=parent):
            inside = any(name == other or name.startswith(f"{other}.") for other in paths)
            if isinstance(module, nn.Linear) and not inside:
                if module.out_features == experts.count:
                    found[name] = "a router: it chooses the experts of a token"
                elif module.out_features == 1:
                    found[name] = "a gate: it weighs the shared expert"
    return found


@dataclass(frozen=True)
class FusedExperts:
    """A tensor of all experts that is made of their own."""

    name: str
    members: list[list[str]]
    """By expert: its tensor, or those of gate and up."""
    transposed: bool

    def make(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The tensor, from a function that reads the members."""
        parts = []
        for names in self.members:
            part = torch.cat([read(name) for name in names])
            parts.append(part.T if self.transposed else part)
        return torch.stack(parts)


def fused_experts(
    model: PreTrainedModel, checkpoint: Checkpoint, stems: set[str]
) -> list[FusedExperts]:
    """Which layers make up tensors of all experts, where the family's files have no others.

    Args:
        model: of transformers' own modules.
        checkpoint: whose layers `stems` are; their biases are looked up in it.
        stems: names of layers.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    modules: dict[str, dict[tuple[int, str], str]] = {}
    for stem in stems:
        name, converter = rename_source_key(f"{stem}.weight", renamings, converters)
        part = split_name(name.removesuffix(".weight")) if converter is None else None
        if part is not None:
            path, (expert, projection) = part
            modules.setdefault(path, {})[expert, ROLES[projection]] = stem
    fused = {name: module for name, module in model.named_modules() if is_fused(module)}
    base = f"{model.base_model_prefix}."
    found = []
    for path, layers in modules.items():
        module = fused.get(path) or fused.get(base + path)
        if module is None:
            continue
        for parameter in _wholes(module):
            bias = parameter.endswith("_bias")
            roles, kind = _roles_in(parameter), "bias" if bias else "weight"
            members = [
                [f"{layers[expert, role]}.{kind}" for role in roles]
                for expert in range(count_of(module))
            ]
            found.append(
                FusedExperts(
                    f"{path}.{parameter}", members,
                    transposed=getattr(module, "is_transposed", False) and not bias,
                )
            )  # fmt: skip
    return found


def _renamed(
    model: PreTrainedModel, checkpoint: Checkpoint, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, tuple[str, str | tuple[int, str]]]]:
    """Tensors of experts -> their module, and which parameter, or whose projection, they are."""
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    base = f"{model.base_model_prefix}."
    for key in checkpoint.tensors:
        name = rename_source_key(key, renamings, [])[0]
        for full in (name, base + name, name.removeprefix(base)):
            path, _, parameter = full.rpartition(".")
            part = split_name(path) if parameter in ("weight", "bias") else None
            if part is not None and wanted(part[0]):
                yield key, part
                break
            if wanted(path):
                yield key, (path, parameter)
                break


def _wholes(fused: nn.Module) -> list[str]:
    """Names of the parameters that hold the layers of all experts."""
    weights = ["gate_up_proj" if "gate" in roles_of(fused) else "up_proj", "down_proj"]
    has_bias = getattr(fused, "has_bias", False)
    return [*weights, *(f"{name}_bias" for name in weights if has_bias)]


def _roles_in(parameter: str) -> tuple[str, ...]:
    """The projections that a parameter of `_wholes` holds."""
    stem = parameter.removesuffix("_bias")
    return {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}[stem]


def _parts(
    path: str, fused: nn.Module, parameter: str, key: str, whole: TensorInfo
) -> Iterator[tuple[str, TensorInfo]]:
    """The parts of a tensor that holds all experts, by the names that they get."""
    if parameter not in _wholes(fused):
        yield key, whole
        return
    expected = tuple(fused.get_parameter(parameter).shape)
    transposed = bool(getattr(fused, "is_transposed", False)) and len(expected) == 3
    if whole.shape != expected:
        if whole.shape != (expected[0], *reversed(expected[1:])):
            raise CheckpointError(
                f"tensor {key} has shape {list(whole.shape)}; the model's config asks for "
                f"{list(expected)}"
            )
        transposed = not transposed
    prefix = key.removesuffix(f".{parameter}") if key.endswith(f".{parameter}") else path
    stem, kind = (
        parameter.removesuffix("_bias"),
        "bias" if parameter.endswith("_bias") else "weight",
    )
    roles = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}[stem]
    for expert in range(whole.shape[0]):
        for half, role in enumerate(roles):
            yield f"{prefix}.{expert}.{NAMES[role]}.{kind}", ExpertSlice.of(
                whole, key, expert, transposed=transposed, half=half if len(roles) == 2 else None,
            )  # fmt: skip
