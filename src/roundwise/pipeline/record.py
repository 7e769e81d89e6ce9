"""What is written of a block: the tensors of its shard, and a record of each of its layers."""

from __future__ import annotations

from typing import Any

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.quantized import QuantizedWeight
from roundwise.models.skeleton import Skeleton
from roundwise.models.split import carried


def layer_record(
    name: str, q: QuantizedWeight, settings: QuantizeConfig, tokens: int
) -> dict[str, Any]:
    """A layer in the result; `tokens` is how many its Hessian was made from."""
    return {
        "name": name,
        "bits": q.bits,
        "group_size": settings.group_size,
        "relative_error": q.relative_error,
        "weight_error": q.weight_error,
        "damp_percent": q.damp_percent,
        "damp_tried": list(q.damp_tried),
        "tokens": tokens,
        "fallback": q.fallback,
    }


def shard_tensors(
    skeleton: Skeleton,
    index: int,
    solved: dict[str, dict[str, torch.Tensor]],
    folded: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """A block's tensors as they go to disk: quantized ones packed, all others as they were.

    Args:
        skeleton: the model.
        index: of the block.
        solved: linear -> suffix -> packed tensor.
        folded: tensors that scales were moved into, by name.
    """
    stems = {skeleton.source_of[f"{name}.weight"].removesuffix(".weight"): name for name in solved}
    tensors: dict[str, Any] = {}
    for tensor, info in skeleton.block_tensors(index).items():
        stem, _, kind = tensor.rpartition(".")
        if stem in stems and kind == "weight":
            parts = solved[stems[stem]].items()
            tensors |= {f"{stem}.{suffix}": part for suffix, part in parts}
        else:
            tensors |= carried({tensor: folded.get(tensor, info)}, {*stems})
    return tensors
