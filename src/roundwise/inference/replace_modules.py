"""Replaces layers of a model by QuantLinear: every layer that has packed codes in the files."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from roundwise.checkpoint.formats import GPTQ
from roundwise.checkpoint.quantized_layers import QuantizedLayer
from roundwise.checkpoint.reader import DTYPES
from roundwise.errors import CheckpointError
from roundwise.inference.packed_linear import PackedLinear
from roundwise.inference.quant_linear import QuantLinear
from roundwise.model.blocks import check_quantized_head, weight_of
from roundwise.model.conversions import Conversions
from roundwise.model.moe import (
    PROJECTION_ROLES,
    expert_count,
    expert_roles,
    is_fused_experts,
    parse_expert_name,
    projection_shape,
    separate_experts,
)


def replace_linears(model: PreTrainedModel, layers: Iterable[QuantizedLayer]) -> None:
    """Replaces every layer that is quantized in the files, experts included.

    Args:
        model: transformers model on the meta device; changed in place.
        layers: the quantized layers of the files.

    Raises:
        CheckpointError: codes that belong to no layer, or whose shape does not fit it, or a
            block of which only some experts are quantized.
    """
    layers = list(layers)
    check_quantized_head(lambda: model.config, [layer.name for layer in layers])
    resolver = _NameResolver(model)
    experts: dict[str, dict[tuple[int, str], QuantLinear]] = defaultdict(dict)
    for quantized in layers:
        place = resolver.resolve(quantized.name)
        if place is None:
            continue
        target, expert = place
        module = model.get_submodule(target)
        if expert is None:
            weight = weight_of(module)
            shape = (weight.shape[0], weight.shape[1])
        else:
            weight, shape = module.down_proj, projection_shape(module, PROJECTION_ROLES[expert[1]])
        layer = _make_layer(quantized, shape, weight.dtype)
        layer.train(module.training)
        if expert is None:
            model.set_submodule(target, layer)
        else:
            experts[target][expert] = layer
    for target, members in experts.items():
        fused = model.get_submodule(target)
        _check_experts(target, fused, members)
        model.set_submodule(target, separate_experts(fused, {**members}))
    _mark_initialized(model)


def _mark_initialized(model: nn.Module) -> None:
    """Tells transformers not to initialize modules around quantized layers.

    Some classes initialize the weights of layers below them, which are not there. Modules are left that
    compute buffers, or have some below them: transformers fills these from either.
    """
    for module in model.modules():
        below = [*module.modules()]
        has_layers = any(isinstance(child, QuantLinear) for child in below)
        if has_layers and not any(child._non_persistent_buffers_set for child in below):
            module._is_hf_initialized = True  # type: ignore[assignment]


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
        self.model, self.conversions = model, Conversions(model)

    def resolve(self, name: str) -> tuple[str, tuple[int, str] | None] | None:
        """Finds the module of a layer.

        Args:
            name: name of the layer in the files.

        Returns:
            Name of the module, and None; for a layer of an expert, name of the module that holds all
            experts, and the expert's (index, projection). None: the class leaves the layer out.

        Raises:
            CheckpointError: the model has no such layer.
        """
        for tensor in self.conversions.candidates(f"{name}.weight"):
            full = tensor.removesuffix(".weight")
            module = self._module(full)
            if module is not None and hasattr(module, "weight"):
                return full, None
            parts = parse_expert_name(full)
            experts = self._module(parts[0]) if parts else None
            if parts and experts is not None and is_fused_experts(experts):
                return parts
        # Draft layers (MTP), which transformers does not load either if they are dense.
        left_out = self.model._keys_to_ignore_on_load_unexpected or ()
        if any(re.search(pattern, f"{name}.weight") for pattern in left_out):
            return None
        raise CheckpointError(
            f"the files have packed codes of {name}, but the model has no such layer"
        )

    def _module(self, name: str) -> nn.Module | None:
        try:
            module: nn.Module = self.model.get_submodule(name)
        except AttributeError:
            return None
        return module


def _make_layer(
    quantized: QuantizedLayer, shape: tuple[int, int], dtype: torch.dtype
) -> QuantLinear:
    """Creates the QuantLinear of a layer on the meta device.

    Args:
        quantized: the layer in the files.
        shape: output and input channels of the layer that is replaced.
        dtype: dtype of the bias.

    Raises:
        CheckpointError: the files have another shape.
    """
    if (quantized.out_features, quantized.in_features) != shape:
        codes = quantized.layout.codes
        raise CheckpointError(
            f"{quantized.name}.{codes} {[*quantized.tensors[codes].shape]} does not fit a layer with "
            f"{shape[1]} input and {shape[0]} output channels"
        )
    kind = QuantLinear if quantized.layout is GPTQ else PackedLinear
    with torch.device("meta"):
        layer = kind(
            quantized.in_features,
            quantized.out_features,
            bits=quantized.bits,
            groups=quantized.groups,
            group_size=quantized.group_size,
            bias=quantized.has_bias,
            stored_g_idx=quantized.layout.g_idx in quantized.tensors,
            stored_zeros=quantized.layout.zeros in quantized.tensors,
            zero_offset=1 if quantized.checkpoint_format == "gptq" else 0,
            dtype=dtype,
        )
        scales = quantized.layout.scales
        stored_dtype = DTYPES[quantized.tensors[scales].dtype]
        setattr(layer, scales, getattr(layer, scales).to(stored_dtype))
    return layer
