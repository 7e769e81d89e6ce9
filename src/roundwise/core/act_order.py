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

    def g_idx(self) -> torch.Tensor:
        """Returns the group of each channel, int32 [in], as the file stores it."""
        g_idx = torch.empty_like(self.group, dtype=torch.int32)
        g_idx[self.perm] = self.group.to(torch.int32)
        return g_idx


def permuted_columns(W: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Returns the columns of W [rows, in] in an order, each contiguous: [in, rows]."""
    columns = W.T.contiguous()
    return columns if is_identity(order) else columns.index_select(0, order)


def is_identity(order: torch.Tensor) -> bool:
    """Returns whether this order [in] changes nothing."""
    return bool((order[1:] > order[:-1]).all())


def processing_order(diagonal: torch.Tensor, config: QuantizeConfig) -> ColumnOrder:
    """Returns the order in which to round columns; ties keep the natural order.

    Args:
        diagonal: [in], the diagonal of H.
        config: `group_size`, `desc_act` and `order` are used.
    """
    width = len(diagonal)
    size, groups = config.columns_per_group(width), config.groups(width)
    channel = torch.arange(width, device=diagonal.device)
    by_sensitivity = torch.argsort(diagonal, descending=True, stable=True)
    if config.desc_act:
        return ColumnOrder(by_sensitivity, channel // size, groups, fixed_grids=False)
    if config.order == "natural":
        return ColumnOrder(channel, channel // size, groups, fixed_grids=False)
    if config.order == "static":
        return ColumnOrder(by_sensitivity, by_sensitivity // size, groups, fixed_grids=True)
    first_of_group = torch.full((groups,), width, device=diagonal.device)
    rank = torch.empty_like(channel)
    rank[by_sensitivity] = channel
    first_of_group.scatter_reduce_(0, channel // size, rank, "amin")
    # Sort by (rank of the group's most sensitive channel, own rank): two stable sorts.
    perm = by_sensitivity[torch.argsort(first_of_group[by_sensitivity // size], stable=True)]
    return ColumnOrder(perm, perm // size, groups, fixed_grids=False)
