"""Most sensitive columns come first, and g_idx is trivial unless desc_act stores it."""

from __future__ import annotations

import pytest
import torch

from roundwise import QuantizeConfig
from roundwise.core.act_order import ColumnOrder, processing_order
from roundwise.core.linalg import is_identity, permuted_columns

DIAGONAL = torch.tensor([1.0, 5, 3, 3, 9, 2, 0, 8])


def order(**settings: object) -> ColumnOrder:
    # group sizes below 8 are refused by the config: repeat each channel four times
    return processing_order(DIAGONAL.repeat_interleave(4), QuantizeConfig(group_size=8, **settings))


@pytest.mark.parametrize("name", ["natural", "static", "group_aware"])
def test_g_idx_is_trivial_without_desc_act(name: str) -> None:
    assert order(order=name).g_idx.tolist() == [k // 8 for k in range(32)]


def test_desc_act_cuts_groups_from_the_sorted_order() -> None:
    ordered = order(desc_act=True)
    # channels by diagonal: 4 (9), 7 (8), 1 (5), 2 and 3 (3, in order), 5 (2), 0 (1), 6 (0)
    assert (ordered.perm[::4] // 4).tolist() == [4, 7, 1, 2, 3, 5, 0, 6]
    assert ordered.g_idx[::4].tolist() == [3, 1, 1, 2, 0, 2, 3, 0]


def test_group_aware_keeps_groups_together() -> None:
    ordered = order(order="group_aware")
    # groups by their best channel: (4, 5) has 9, (6, 7) 8, (0, 1) 5, (2, 3) 3; best first inside
    assert (ordered.perm[::4] // 4).tolist() == [4, 5, 7, 6, 1, 0, 2, 3]
    assert not ordered.fixed_grids


def test_static_is_the_full_act_order_with_grids_fixed_beforehand() -> None:
    ordered = order(order="static")
    assert (ordered.perm[::4] // 4).tolist() == [4, 7, 1, 2, 3, 5, 0, 6]
    assert ordered.fixed_grids


@pytest.mark.parametrize(
    "settings", [{"desc_act": True}, {"order": "static"}, {"order": "natural"}]
)
def test_groups_are_counted(settings: dict) -> None:
    assert order(**settings).groups == 4
    assert processing_order(DIAGONAL, QuantizeConfig(group_size=-1, **settings)).groups == 1


def test_columns_are_permuted() -> None:
    W, perm = torch.arange(6).view(2, 3), torch.tensor([2, 0, 1])
    columns = permuted_columns(W, perm)
    assert columns.tolist() == [[2, 5], [0, 3], [1, 4]]
    assert columns.is_contiguous()
    assert is_identity(torch.arange(3))
    assert not is_identity(perm)
