"""Maps the names of a model's tensors to their names in a checkpoint."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from roundwise.checkpoint.reader import Checkpoint, TensorInfo
from roundwise.errors import CheckpointError


def map_tensor_names(model: transformers.PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Returns checkpoint tensor name by model tensor name, for every parameter and stored buffer.

    Transformers translates old names and missing base prefixes (GPT-2's `h.0…` for `transformer.h.0…`);
    tied parameters may be stored under any of their names.

    Args:
        model: the model, on the meta device.
        checkpoint: its checkpoint.

    Raises:
        CheckpointError: a tensor that the model needs is missing or has another shape.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    names = dict(model.named_parameters(remove_duplicate=False))
    names |= {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in computed}
    stored: dict[str, str] = {}
    for key in checkpoint.tensors:
        name, converter = rename_source_key(
            key, renamings, converters, model.base_model_prefix, names
        )
        if converter is not None:  # experts are separate layers here, so nothing is converted
            name = rename_source_key(key, renamings, [], model.base_model_prefix, names)[0]
        stored[name] = key
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    partners: dict[str, list[str]] = {}
    for left, right in ties.items():
        partners.setdefault(left, []).append(right)
        partners.setdefault(right, []).append(left)
    checkpoint_name_of: dict[str, str] = {}
    missing = []
    for name in names:
        match = next((stored[n] for n in [name, *partners.get(name, [])] if n in stored), None)
        if match is None:
            missing.append(name)
            continue
        checkpoint_name_of[name] = match
        shape, expected = checkpoint.tensors[match].shape, tuple(names[name].shape)
        if shape != expected:
            raise CheckpointError(
                f"tensor {match} has shape {list(shape)}; the model's config requires {list(expected)}"
            )
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{checkpoint.folder} lacks {', '.join(missing[:3])}{more}, which "
            f"{type(model).__name__} of transformers {transformers.__version__} needs"
        )
    return checkpoint_name_of


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
