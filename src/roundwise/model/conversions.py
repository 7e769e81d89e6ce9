"""Applies transformers' own conversions: a checkpoint's tensors with the model's names and values.

While transformers loads a checkpoint, it renames tensors and joins, cuts, transposes or permutes some of
them. `converted_checkpoint` returns a view in which every tensor is one of the model's; a converted one
is computed from its `origins` when it is read. `map_tensor_names` then finds each tensor of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from roundwise.checkpoint.reader import DTYPES, Checkpoint, CheckpointView, TensorInfo
from roundwise.checkpoint.transformed_view import ComputedInfo, stored_as
from roundwise.errors import CheckpointError
from roundwise.model.foreign_errors import foreign_errors
from roundwise.model.moe import is_fused_experts, parse_expert_name


class Conversions:
    """Transformers' renamings and converters for a model.

    Some renamings depend on the names before them, so `place` must see the names in natural order.

    Args:
        model: the model, on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.converter_of = {p: c for c in self.converters for p in c.source_patterns}
        self.tensors = stored_tensors(model)

    def place(self, key: str) -> tuple[str, str | None]:
        """Returns the model's name of a tensor of the files, and the converter's pattern that matched.

        Args:
            key: name in the files.

        Returns:
            The name, and None if the tensor is taken as it is. If a converter makes several tensors of
            it, the name is that of the first.
        """
        name, pattern = self._rename(key, self.converters)
        if name not in self.tensors and key in self.tensors:
            return key, None
        return name, pattern

    def rename(self, key: str) -> str:
        """Returns the model's name of a tensor that is taken as it is, whatever converters say."""
        name = self._rename(key, [])[0]
        return key if name not in self.tensors and key in self.tensors else name

    def candidates(self, key: str) -> list[str]:
        """Returns the names that a tensor of the files may have in the model, the likeliest first.

        The base model's prefix may be missing in the files, or be too much.
        """
        base = f"{self.model.base_model_prefix}."
        renamed = str(rename_source_key(key, self.renamings, [])[0])
        return [n for name in (renamed, key) for n in (name, base + name, name.removeprefix(base))]

    def converted_name(self, key: str) -> str:
        """Returns a name in the files with only its converted part replaced."""
        for converter in self.converters:
            name, pattern = converter.rename_source_key(key)
            if pattern is not None:
                return str(name)
        return key

    def _rename(self, key: str, converters: list[WeightConverter]) -> tuple[str, str | None]:
        name, pattern = rename_source_key(
            key, self.renamings, converters, self.model.base_model_prefix, self.tensors
        )
        return str(name), pattern


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns all parameters and persistent buffers of a model by name, tied ones under all names."""
    computed = {name for name, _ in model.named_non_persistent_buffers()}  # type: ignore[operator]
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    buffers = model.named_buffers(remove_duplicate=False)
    return tensors | {name: buffer for name, buffer in buffers if name not in computed}


@dataclass(frozen=True, eq=False)
class Conversion:
    """Tensors of the files and the converter that makes tensors of the model from them."""

    converter: WeightConverter
    model: PreTrainedModel
    target: str
    """Name of the first tensor that it makes."""
    sources: list[tuple[str, str, TensorInfo]] = field(default_factory=list)
    """(pattern, name in the files, tensor), in the order of the files."""

    @property
    def origins(self) -> dict[str, TensorInfo]:
        """The tensors of the files by name."""
        return {key: info for _, key, info in self.sources}

    def run(self, read: Callable[[TensorInfo], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the converted tensors by their names in the model.

        Args:
            read: returns the tensor of a source; on the meta device for shapes only.
        """
        converter = deepcopy(self.converter)
        for pattern, key, info in self.sources:
            converter.add_tensor(self.target, key, pattern, read(info))
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    def without_checks(self) -> Conversion | None:
        """Returns the conversion for these shapes only, so that it also works on some of the rows.

        Returns:
            The conversion; None if it changes nothing.
        """
        operations = []
        for op in self.converter.operations:
            if not getattr(op, "check_dims", False):
                operations.append(op)
            elif self.sources[0][2].shape != tuple(self.model.get_parameter(self.target).shape):
                operations.append(Transpose(op.dim0, op.dim1))
        if not operations:
            return None
        converter = deepcopy(self.converter)
        converter.operations = operations
        return Conversion(converter, self.model, self.target, self.sources)

    def keeps_rows(self) -> bool:
        """Tells whether each entry of axis 0 (an expert, mostly) is converted on its own."""
        dims = [
            [getattr(op, name) for name in ("dim", "dim0", "dim1") if hasattr(op, name)]
            for op in self.converter.operations
        ]
        return all(axes and min(axes) > 0 for axes in dims)

    def tensors(self) -> dict[str, TensorInfo]:
        """Returns the converted tensors by their names in the model; nothing is read."""
        shapes = self.run(
            lambda info: torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
        )
        return {name: self._info(name, meta) for name, meta in shapes.items()}

    def _info(self, name: str, meta: torch.Tensor) -> TensorInfo:
        def rows(start: int, count: int) -> TensorInfo:
            parts = [(p, k, info.rows(start, count)) for p, k, info in self.sources]
            part = Conversion(self.converter, self.model, self.target, parts)
            return part._info(name, meta[start : start + count])

        return ComputedInfo.from_source(
            self.sources[0][2], tuple(meta.shape), meta.dtype,
            lambda: self.run(TensorInfo.read)[name], origins=self.origins,
            select_rows=rows if self.keeps_rows() else None, stored_as=stored_as(self.sources[0][2]),
        )  # fmt: skip


def converted_checkpoint(model: PreTrainedModel, checkpoint: Checkpoint) -> Checkpoint:
    """Returns a view with the tensors that transformers makes while loading in place of their sources.

    Experts that the files hold one by one stay as they are: `install_linear_experts` uses them so.

    Args:
        model: the model, on the meta device, as transformers builds it.
        checkpoint: its checkpoint.
    """
    conversions = Conversions(model)
    groups: dict[str, Conversion] = {}
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = conversions.place(key)
        if pattern is None or name not in conversions.tensors or _is_one_expert(conversions, key):
            continue
        group = groups.setdefault(name, Conversion(conversions.converter_of[pattern], model, name))
        group.sources.append((pattern, key, checkpoint.tensors[key]))
    tensors = dict(checkpoint.tensors)
    for group in filter(None, (group.without_checks() for group in groups.values())):
        for key in group.origins:
            tensors.pop(key, None)
        first = group.sources[0][1]
        for name, info in _converted(group).items():
            tensors[_name_in_files(conversions, first, group.target, name)] = info
    return checkpoint if tensors == checkpoint.tensors else CheckpointView(checkpoint, tensors)


def _is_one_expert(conversions: Conversions, key: str) -> bool:
    """Tells whether a tensor of the files is one expert's, in a module that has all experts fused."""
    for name in conversions.candidates(key):
        parsed = parse_expert_name(name.rpartition(".")[0])
        try:
            if parsed and is_fused_experts(conversions.model.get_submodule(parsed[0])):
                return True
        except AttributeError:
            continue
    return False


def _converted(group: Conversion) -> dict[str, TensorInfo]:
    """Returns the tensors that a conversion makes.

    Raises:
        CheckpointError: transformers cannot convert tensors of these shapes.
    """
    names = ", ".join([*group.origins][:3])
    with foreign_errors(f"transformers cannot convert {names} to {group.target}"):
        return group.tensors()


def _name_in_files(conversions: Conversions, key: str, first: str, name: str) -> str:
    """Returns a name in the files for the converted tensor `name`, in the style of its source `key`.

    `first` is the first tensor made of it; without such a name, the name in the model is returned.
    """
    renamed = conversions.converted_name(key)
    patterns = conversions.converter_of[conversions.place(key)[1] or ""].target_patterns
    for pattern in patterns:
        if first.replace(patterns[0], pattern, 1) == name:
            candidate = renamed.replace(patterns[0], pattern, 1)
            codes = conversions.place(f"{candidate.removesuffix('weight')}qweight")
            if conversions.rename(candidate) == name and codes[1] is None:
                return candidate
    return name


def map_tensor_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Returns checkpoint tensor name by model tensor name, for every parameter and stored buffer.

    Transformers translates old names and missing base prefixes (GPT-2's `h.0…` for `transformer.h.0…`);
    tied parameters may be stored under any of their names. Parameters that a model computes instead of
    storing them (Marian's positions) have no name.

    Args:
        model: the model, on the meta device.
        checkpoint: its checkpoint, as `converted_checkpoint` returns it.

    Raises:
        CheckpointError: a tensor that the model needs is missing or has another shape.
    """
    conversions = Conversions(model)
    stored = {conversions.rename(k): k for k in sorted(checkpoint.tensors, key=dot_natural_key)}
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    partners: dict[str, list[str]] = {}
    for left, right in ties.items():
        partners.setdefault(left, []).append(right)
        partners.setdefault(right, []).append(left)
    checkpoint_name_of: dict[str, str] = {}
    missing = []
    for name, tensor in conversions.tensors.items():
        match = next((stored[n] for n in [name, *partners.get(name, [])] if n in stored), None)
        if match is None:
            missing.append(name)
            continue
        checkpoint_name_of[name] = match
        shape, expected = checkpoint.tensors[match].shape, tuple(tensor.shape)
        if shape != expected:
            raise CheckpointError(
                f"tensor {match} has shape {list(shape)}; the model's config requires {list(expected)}"
            )
    _check_missing(model, checkpoint, missing)
    return checkpoint_name_of


def _check_missing(model: PreTrainedModel, checkpoint: Checkpoint, names: list[str]) -> None:
    """Raises CheckpointError if a tensor is missing that transformers requires."""
    computed = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
    missing = [name for name in names if not any(re.search(p, name) for p in computed)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{checkpoint.folder} lacks {', '.join(missing[:3])}{more}, which "
            f"{type(model).__name__} of transformers {transformers.__version__} needs"
        )


def dense_layers(
    model: nn.Module, tensors: Mapping[str, TensorInfo], quantized: Container[str]
) -> list[str]:
    """Returns the names of layers with a matrix that is not quantized; no embeddings.

    Engines build linear layers for them, routers too, and must be told that they are dense. They have
    their names in the model and, if those differ, their names in the files. Layers that only the files
    have are among them, such as draft layers.

    Args:
        model: the model.
        tensors: tensors of its files by name.
        quantized: names of the quantized layers, with or without the prefix of the base model.
    """
    base = f"{getattr(model, 'base_model_prefix', '')}."
    modules = dict(model.named_modules())
    names = dict.fromkeys(
        name
        for name, module in modules.items()
        if isinstance(weight := getattr(module, "weight", None), torch.Tensor) and weight.ndim > 1
    )
    names |= dict.fromkeys(
        name.removesuffix(".weight")
        for name, info in tensors.items()
        if name.endswith(".weight") and len(info.shape) > 1
    )

    def is_dense(name: str) -> bool:
        aliases = (name, base + name, name.removeprefix(base))
        if any(isinstance(modules.get(alias), nn.Embedding) for alias in aliases):
            return False
        # A quantized head is inside an OutputHead of its name.
        return not any(alias in quantized for alias in (*aliases, name.rpartition(".")[0]))

    return [name for name in names if is_dense(name)]


def ignored_modules(
    model: nn.Module, tensors: Mapping[str, TensorInfo], used: Iterable[str]
) -> list[str]:
    """Returns the outermost modules with matrices that the files have and the model does not.

    Draft layers (MTP) are such: transformers' classes leave them out. They are carried over as they are.

    Args:
        model: the model.
        tensors: tensors of its files by name.
        used: names of the tensors that the model takes.
    """
    base = f"{getattr(model, 'base_model_prefix', '')}."
    taken = {*used}
    known = {
        name[:end]
        for stem in [*(name for name, _ in model.named_modules()), *taken]
        for name in (stem, stem.removeprefix(base))
        for end in [*(i for i, letter in enumerate(name) if letter == "."), len(name)]
    }
    ignored: dict[str, None] = {}
    for name, info in tensors.items():
        if name in taken or len(info.shape) < 2:
            continue
        parts = name.removesuffix(".weight").split(".")
        starts = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        module = next((start for start in starts if start not in known), None)
        if module is not None:
            ignored[module] = None
    return [*ignored]
