"""Most sensitive columns first, and g_idx trivial wherever the file may not say otherwise."""

from __future__ import annotations

import pytest
import torch

from roundwise import QuantizeConfig
from roundwise.core.act_order import processing_order

DIAGONAL = torch.tensor([1.0, 5, 3, 3, 9, 2, 0, 8])


def order(**settings: object) -> object:
    # group sizes below 8 are refused by the config: repeat each channel four times
    return processing_order(DIAGONAL.repeat_interleave(4), QuantizeConfig(group_size=8, **settings))


@pytest.mark.parametrize("name", ["natural", "static", "group_aware"])
def test_g_idx_is_trivial_without_desc_act(name: str) -> None:
    assert order(order=name).g_idx().tolist() == [k // 8 for k in range(32)]


def test_desc_act_cuts_groups_from_the_sorted_order() -> None:
    found = order(desc_act=True)
    # channels by diagonal: 4 (9), 7 (8), 1 (5), 2 and 3 (3, in order), 5 (2), 0 (1), 6 (0)
    assert (found.perm[::4] // 4).tolist() == [4, 7, 1, 2, 3, 5, 0, 6]
    assert found.g_idx()[::4].tolist() == [3, 1, 1, 2, 0, 2, 3, 0]


def test_group_aware_keeps_groups_together() -> None:
    found = order(order="group_aware")
    # groups by their best channel: (4, 5) has 9, (6, 7) 8, (0, 1) 5, (2, 3) 3; best first inside
    assert (found.perm[::4] // 4).tolist() == [4, 5, 7, 6, 1, 0, 2, 3]
    assert not found.fixed_grids


def test_static_is_the_full_act_order_with_grids_fixed_beforehand() -> None:
    found = order(order="static")
    assert (found.perm[::4] // 4).tolist() == [4, 7, 1, 2, 3, 5, 0, 6]
    assert found.fixed_grids
