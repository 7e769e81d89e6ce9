"""The order in which columns are rounded, and which group each column belongs to.

The first column rounded has all others left to absorb its error, the last has none: so the most
sensitive columns, those with the largest H[k, k], go first. The setting decides what the file must hold:

    natural      channels as they are; g_idx trivial
    desc_act     most sensitive first, groups are cut from that order; g_idx must be stored
    static       most sensitive first, grids fixed for each original group beforehand; g_idx trivial
    group_aware  sorted inside each original group, groups by their largest H[k, k]; g_idx trivial

A trivial g_idx is k // group_size for channel k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from roundwise.config import QuantizeConfig


class ColumnOrder(NamedTuple):
    """Processing order of the columns of a weight [out, in]."""

    perm: torch.Tensor
    """int64 [in]: the channel rounded at each step."""
    group: torch.Tensor
    """int64 [in]: the group of each step (not of each channel)."""
    groups: int
    """Number of groups."""
    fixed_grids: bool
    """Columns of different groups alternate, so all grids must be known before the first step."""
    g_idx: torch.Tensor
    """int32 [in]: the group of each channel, as the file stores it."""


def processing_order(diagonal: torch.Tensor, config: QuantizeConfig) -> ColumnOrder:
    """Returns the order in which to round columns; ties keep the natural order.

    Args:
        diagonal: [in], the diagonal of H.
        config: `group_size`, `desc_act` and `order` are used.
    """
    width = len(diagonal)
    size = width if config.group_size == -1 else config.group_size
    groups = -(-width // size)
    channel = torch.arange(width, device=diagonal.device)
    by_sensitivity = torch.argsort(diagonal, descending=True, stable=True)
    fixed_grids = False
    if config.desc_act:
        perm, group = by_sensitivity, channel // size
    elif config.order == "natural":
        perm, group = channel, channel // size
    elif config.order == "static":
        perm, group, fixed_grids = by_sensitivity, by_sensitivity // size, True
    else:
        first_of_group = torch.full((groups,), width, device=diagonal.device)
        rank = torch.empty_like(channel)
        rank[by_sensitivity] = channel
        first_of_group.scatter_reduce_(0, channel // size, rank, "amin")
        # Sort by (rank of the group's most sensitive channel, own rank): two stable sorts.
        perm = by_sensitivity[torch.argsort(first_of_group[by_sensitivity // size], stable=True)]
        group = perm // size
    g_idx = torch.empty_like(group, dtype=torch.int32)
    g_idx[perm] = group.to(torch.int32)
    return ColumnOrder(perm, group, groups, fixed_grids, g_idx)
