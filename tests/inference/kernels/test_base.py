"""A packed weight stands for scale · (code - zero), computed here entry by entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roundwise.core.quantized_weight import WIDTHS, pack
from roundwise.inference.kernels.base import PackedWeight
from tests.inference.kernels.packed import random_weight


def bits_at(words: list[int], position: int, bits: int) -> int:
    """The `bits` bits from `position` on of a little-endian stream of 32-bit words."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return stream >> position & (2**bits - 1)


@given(
    bits=st.sampled_from(WIDTHS),
    group_size=st.sampled_from([5, 16, 32, 64]),
    act_order=st.booleans(),
    stored_g_idx=st.booleans(),
    zero_offset=st.integers(0, 1),
    seed=st.integers(0, 1000),
)
def test_dequantizes_to_what_the_format_says(
    bits: int, group_size: int, act_order: bool, stored_g_idx: bool, zero_offset: int, seed: int
) -> None:
    weight = random_weight(
        bits, 64, 32, group_size, seed=seed, sym=False, act_order=act_order,
        stored_g_idx=stored_g_idx or act_order, zero_offset=zero_offset,
    )  # fmt: skip
    assert (weight.in_features, weight.out_features) == (64, 32)
    assert weight.groups == -(-64 // group_size)
    W = weight.dequantize()
    for i in (0, 1, 31, 33, 63):
        group = i // group_size if weight.g_idx is None else int(weight.g_idx[i])
        for o in (0, 11, 31):
            code = bits_at(weight.qweight[:, o].tolist(), i * bits, bits)
            stored = bits_at(weight.qzeros[group].tolist(), o * bits, bits)
            zero = (stored + zero_offset) % 2**bits
            assert W[i, o] == weight.scales[group, o].float() * (code - zero)


@pytest.mark.parametrize("stored", [0, 15])
def test_zero_points_of_the_first_version_are_stored_minus_one(stored: int) -> None:
    """15 + 1 is 0 with 4 bits, as AutoGPTQ's kernels have it."""
    qzeros = pack(torch.full((8, 1), stored), 4).T.contiguous()
    weight = PackedWeight(
        pack(torch.zeros(8, 8, dtype=torch.int64), 4), qzeros, torch.ones(1, 8), None, 4, 1
    )
    assert weight.zeros().tolist() == [[(stored + 1) % 16] * 8]
    assert weight.zeros().dtype == torch.int32


def test_without_g_idx_groups_are_consecutive_channels() -> None:
    weight = random_weight(4, 40, 8, 16, stored_g_idx=False)
    assert weight.channel_groups().tolist() == [0] * 14 + [1] * 14 + [2] * 12
    assert random_weight(4, 40, 8, 16).channel_groups().tolist() == [0] * 16 + [1] * 16 + [2] * 8
