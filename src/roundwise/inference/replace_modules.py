"""From the tensors in the files to the layers of the model: QuantLinear wherever there are codes."""

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
    ROLES,
    LinearExperts,
    count_of,
    is_fused,
    roles_of,
    shape_of,
    split_name,
)

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def replace_linears(
    model: PreTrainedModel, tensors: dict[str, TensorInfo], *, zero_offset: int
) -> None:
    """Puts a QuantLinear wherever the files hold a qweight, into mixtures of experts too.

    Args:
        model: on the meta device.
        tensors: of all files, by name.
        zero_offset: 1 if zero points are stored minus one (v1), else 0.

    Raises:
        CheckpointError: a qweight that belongs to no module, or whose shape does not fit it.
    """
    names = _Names(model)
    experts: dict[str, dict[tuple[int, str], QuantLinear]] = defaultdict(dict)
    for name in [t.removesuffix(".qweight") for t in tensors if t.endswith(".qweight")]:
        target, part = names.find(name)
        module = model.get_submodule(target)
        if part is None:
            weight = weight_of(module)
            shape = (weight.shape[0], weight.shape[1])
        else:
            weight, shape = module.down_proj, shape_of(module, ROLES[part[1]])
        layer = _layer(name, tensors, shape, zero_offset, weight.dtype).train(module.training)
        if part is None:
            model.set_submodule(target, layer)
        else:
            experts[target][part] = layer
    for target, layers in experts.items():
        original = model.get_submodule(target)
        _check_experts(target, original, layers)
        model.set_submodule(target, LinearExperts(original, {**layers}))


def _check_experts(
    name: str, original: nn.Module, layers: dict[tuple[int, str], QuantLinear]
) -> None:
    """Refuses files that hold some of a block's experts, or more than there are."""
    count, wanted = count_of(original), set(roles_of(original))
    for expert in range(count):
        roles = {ROLES[projection] for number, projection in layers if number == expert}
        if roles != wanted:
            raise CheckpointError(
                f"{name}.{expert} has no quantized {', '.join(sorted(wanted - roles))} projection: "
                "experts of a block are quantized all or none"
            )
    if len(layers) != count * len(wanted):
        raise CheckpointError(f"{name}: the files hold more than the model's {count} experts")


class _Names:
    """Where the model has what the files call by an older name, or without the base model's prefix."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.prefix = model, f"{model.base_model_prefix}."
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]

    def find(self, name: str) -> tuple[str, tuple[int, str] | None]:
        """A layer's module, or its experts' module and its place there."""
        renamed = rename_source_key(f"{name}.weight", self.renamings, [])[0].removesuffix(".weight")
        for known in (renamed, name):
            for full in (known, self.prefix + known, known.removeprefix(self.prefix)):
                module = self._module(full)
                if module is not None and hasattr(module, "weight"):
                    return full, None
                part = split_name(full)
                experts = self._module(part[0]) if part else None
                if part and experts is not None and is_fused(experts):
                    return part
        raise CheckpointError(f"the files hold {name}.qweight, but the model has no such layer")

    def _module(self, name: str) -> nn.Module | None:
        try:
            module: nn.Module = self.model.get_submodule(name)
        except AttributeError:
            return None
        return module


def _layer(
    name: str, tensors: dict[str, TensorInfo], shape: tuple[int, int], zero_offset: int,
    dtype: torch.dtype,
) -> QuantLinear:  # fmt: skip
    """The layer of `name` on the meta device, as wide as its tensors say."""
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
            f"{name}.qweight {[words, columns]} does not fit a layer of "
            f"{in_features} to {out_features} channels"
        )
    g_idx = tensors.get(f"{name}.g_idx")
    if g_idx is not None and tuple(g_idx.shape) != (in_features,):
        raise CheckpointError(
            f"{name}.g_idx {[*g_idx.shape]} does not name a group for each of {in_features} channels"
        )
    if g_idx is None and in_features % parts["scales"].shape[0]:
        raise CheckpointError(
            f"{name} has {in_features} input channels in {parts['scales'].shape[0]} groups, and no "
            "g_idx that says which channel belongs to which"
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
        layer.scales = layer.scales.to(DTYPES.get(tensors[f"{name}.scales"].dtype, torch.float16))
    return layer
