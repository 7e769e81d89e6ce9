"""Replaces layers of a model by QuantLinear: every layer that has packed codes in the files."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from roundwise.checkpoint.gptq_format import infer_bits
from roundwise.checkpoint.reader import TensorInfo
from roundwise.errors import CheckpointError
from roundwise.inference.quant_linear import QuantLinear
from roundwise.model.blocks import weight_of
from roundwise.model.moe import (
    PROJECTION_ROLES,
    LinearExperts,
    expert_count,
    expert_roles,
    is_fused_experts,
    parse_expert_name,
    projection_shape,
)

#: dtype in a safetensors header -> torch dtype of scales; any other is read as float16.
SCALE_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def replace_linears(
    model: PreTrainedModel, tensors: dict[str, TensorInfo], *, zero_offset: int
) -> None:
    """Replaces every layer that has a qweight in the files, experts included.

    Args:
        model: transformers model on the meta device; changed in place.
        tensors: headers of the tensors of all files, by name.
        zero_offset: 1 if zero points are stored minus one (v1), else 0.

    Raises:
        CheckpointError: a qweight that belongs to no layer, or whose shape does not fit it, or a
            block of which only some experts are quantized.
    """
    resolver = _NameResolver(model)
    experts: dict[str, dict[tuple[int, str], QuantLinear]] = defaultdict(dict)
    for name in [t.removesuffix(".qweight") for t in tensors if t.endswith(".qweight")]:
        target, expert = resolver.resolve(name)
        module = model.get_submodule(target)
        if expert is None:
            weight = weight_of(module)
            shape = (weight.shape[0], weight.shape[1])
        else:
            weight, shape = module.down_proj, projection_shape(module, PROJECTION_ROLES[expert[1]])
        layer = _make_layer(name, tensors, shape, zero_offset, weight.dtype)
        layer.train(module.training)
        if expert is None:
            model.set_submodule(target, layer)
        else:
            experts[target][expert] = layer
    for target, layers in experts.items():
        fused = model.get_submodule(target)
        _check_experts(target, fused, layers)
        model.set_submodule(target, LinearExperts(fused, {**layers}))


def _check_experts(name: str, fused: nn.Module, layers: dict[tuple[int, str], QuantLinear]) -> None:
    """Fails if the files have quantized layers for only some experts, or for more than there are."""
    count, wanted = expert_count(fused), set(expert_roles(fused))
    for expert in range(count):
        roles = {PROJECTION_ROLES[projection] for number, projection in layers if number == expert}
        if roles != wanted:
            raise CheckpointError(
                f"{name}.{expert} has no quantized {', '.join(sorted(wanted - roles))} projection: "
                "either all experts of a block must be quantized, or none"
            )
    if len(layers) != count * len(wanted):
        raise CheckpointError(f"{name}: the files have more than the model's {count} experts")


class _NameResolver:
    """Finds the module of a layer whose name in the files can be outdated or lack the model's prefix."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.prefix = model, f"{model.base_model_prefix}."
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]

    def resolve(self, name: str) -> tuple[str, tuple[int, str] | None]:
        """Finds the module of a layer.

        Args:
            name: name of the layer in the files.

        Returns:
            Name of the module, and None; for a layer of an expert, name of the module that holds all
            experts, and the expert's (index, projection).

        Raises:
            CheckpointError: the model has no such layer.
        """
        renamed = rename_source_key(f"{name}.weight", self.renamings, [])[0].removesuffix(".weight")
        for candidate in (renamed, name):
            for full in (candidate, self.prefix + candidate, candidate.removeprefix(self.prefix)):
                module = self._module(full)
                if module is not None and hasattr(module, "weight"):
                    return full, None
                parts = parse_expert_name(full)
                experts = self._module(parts[0]) if parts else None
                if parts and experts is not None and is_fused_experts(experts):
                    return parts
        raise CheckpointError(f"the files have {name}.qweight, but the model has no such layer")

    def _module(self, name: str) -> nn.Module | None:
        try:
            module: nn.Module = self.model.get_submodule(name)
        except AttributeError:
            return None
        return module


def _make_layer(
    name: str, tensors: dict[str, TensorInfo], shape: tuple[int, int], zero_offset: int,
    dtype: torch.dtype,
) -> QuantLinear:  # fmt: skip
    """Creates the QuantLinear of a layer on the meta device, with the width that its tensors have.

    Args:
        name: name of the layer in the files.
        tensors: headers of the tensors of all files, by name.
        shape: output and input channels of the layer that is replaced.
        zero_offset: 1 if zero points are stored minus one (v1), else 0.
        dtype: dtype of the bias.

    Raises:
        CheckpointError: a tensor is missing or its shape does not fit.
    """
    parts = {
        suffix: torch.empty(tensors[f"{name}.{suffix}"].shape, device="meta")
        for suffix in ("qweight", "qzeros", "scales")
        if f"{name}.{suffix}" in tensors
    }
    if len(parts) < 3:
        raise CheckpointError(f"{name} has a qweight, but qzeros or scales are missing")
    bits = infer_bits(parts, name)
    out_features, in_features = shape
    words, columns = parts["qweight"].shape
    if (in_features * bits, out_features) != (words * 32, columns):
        raise CheckpointError(
            f"{name}.qweight {[words, columns]} does not fit a layer with "
            f"{in_features} input and {out_features} output channels"
        )
    g_idx = tensors.get(f"{name}.g_idx")
    if g_idx is not None and tuple(g_idx.shape) != (in_features,):
        raise CheckpointError(
            f"{name}.g_idx {[*g_idx.shape]} does not have one entry per input channel ({in_features})"
        )
    if g_idx is None and in_features % parts["scales"].shape[0]:
        raise CheckpointError(
            f"{name} has {in_features} input channels in {parts['scales'].shape[0]} groups, and no "
            "g_idx that assigns channels to groups of unequal size"
        )
    with torch.device("meta"):
        layer = QuantLinear(
            in_features,
            out_features,
            bits=bits,
            groups=parts["scales"].shape[0],
            bias=f"{name}.bias" in tensors,
            stored_g_idx=g_idx is not None,
            zero_offset=zero_offset,
            dtype=dtype,
        )
        layer.scales = layer.scales.to(
            SCALE_DTYPES.get(tensors[f"{name}.scales"].dtype, torch.float16)
        )
    return layer
