"""What is written of a block: the tensors of its shard, and a record of each of its layers."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.quantized import QuantizedWeight
from roundwise.models.skeleton import Skeleton
from roundwise.models.split import carried
from roundwise.pipeline.ranks import Ranks


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


def widths(layers: list[dict[str, Any]]) -> dict[str, str]:
    """For each kind of layer, bits and group sizes from the first block on; none if all agree."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        kind = re.sub(r"\d+(?=\.)", "*", layer["name"])
        found.setdefault(kind, []).append(f"{layer['bits']}/{layer['group_size']}")
    if len({width for each in found.values() for width in each}) < 2:
        return {}
    return {
        kind: ", ".join(f"{width} x{len([*same])}" for width, same in groupby(each))
        for kind, each in found.items()
    }


def join_parts(q: QuantizedWeight, count: int, total: int, ranks: Ranks) -> QuantizedWeight:
    """A weight of `total` rows from the parts that the ranks have solved.

    Args:
        q: this rank's.
        count: how many of its rows count.
        total: rows of the weight.
        ranks: who have the others.
    """
    codes, scales, zeros = (
        ranks.join_rows(part[:count], total) for part in (q.codes, q.scales, q.zeros)
    )
    known = q.relative_error is not None
    sums = [(q.relative_error or 0.0) * q.energy, q.energy]
    sums += [q.weight_error * q.weight_energy, q.weight_energy]
    mine = torch.tensor(sums if count else [0.0] * 4, dtype=torch.float64)
    lost, energy, error, weight = ranks.sum(mine).tolist()
    return replace(
        q, codes=codes, scales=scales, zeros=zeros, energy=energy, weight_energy=weight,
        relative_error=(lost / energy if energy else 0.0) if known else None,
        weight_error=error / weight if weight else 0.0,
    )  # fmt: skip


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
