"""The order in which columns are rounded, and which group each column belongs to.

The first column rounded has all others left to absorb its error, the last has none: so the most
sensitive columns, those with the largest H[k, k], go first. What that does to the file:

    natural      channels as they are
    desc_act     most sensitive first, groups are cut from that order: g_idx must be stored
    static       most sensitive first, grids fixed per original group beforehand: g_idx trivial
    group_aware  sorted inside each original group, groups by their largest H[k, k]: g_idx trivial
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from roundwise.config import QuantizeConfig


class ColumnOrder(NamedTuple):
    """A processing order of `in` columns."""

    perm: torch.Tensor
    """int64 [in]: the channel rounded at each step."""
    group: torch.Tensor
    """int64 [in]: the group of each step (not of each channel)."""
    fixed_grids: bool
    """Groups are visited piecewise, so their grids must be known before the first step."""

    def g_idx(self) -> torch.Tensor:
        """int32 [in]: the group of each channel, as the file stores it."""
        g_idx = torch.empty_like(self.group, dtype=torch.int32)
        g_idx[self.perm] = self.group.to(torch.int32)
        return g_idx


def permuted_columns(W: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The columns of W [rows, in] in an order, each contiguous: [in, rows]."""
    columns = W.T.contiguous()
    return columns if is_identity(order) else columns.index_select(0, order)


def is_identity(order: torch.Tensor) -> bool:
    """This order [in] leaves everything where it is."""
    return bool((order[1:] > order[:-1]).all())


def processing_order(diagonal: torch.Tensor, config: QuantizeConfig) -> ColumnOrder:
    """Order for a Hessian with this `diagonal` [in]; ties keep the natural order."""
    width = len(diagonal)
    size = width if config.group_size == -1 else config.group_size
    channel = torch.arange(width, device=diagonal.device)
    by_sensitivity = torch.argsort(diagonal, descending=True, stable=True)
    if config.desc_act:
        return ColumnOrder(by_sensitivity, channel // size, fixed_grids=False)
    if config.order == "natural":
        return ColumnOrder(channel, channel // size, fixed_grids=False)
    if config.order == "static":
        return ColumnOrder(by_sensitivity, by_sensitivity // size, fixed_grids=True)
    first_of_group = torch.full((config.groups(width),), width, device=diagonal.device)
    rank = torch.empty_like(channel)
    rank[by_sensitivity] = channel
    first_of_group.scatter_reduce_(0, channel // size, rank, "amin")
    # Sort by (rank of the group's most sensitive channel, own rank): two stable sorts.
    perm = by_sensitivity[torch.argsort(first_of_group[by_sensitivity // size], stable=True)]
    return ColumnOrder(perm, perm // size, fixed_grids=False)
