"""Blocks hold exactly the weights of our codes, as the `gguf` package reads them."""

import gguf
import numpy as np
import pytest
import torch

from roundwise.core.quantized_weight import QuantizedWeight
from roundwise.gguf.blocks import (
    BLOCK_TYPES,
    BlockedCodes,
    CodeRange,
    block_type,
    blocked_codes,
    pack_blocks,
)

ROWS, COLUMNS, GROUP = 6, 192, 64


def weight(bits: int, *, sym: bool, group: int = GROUP, columns: int = COLUMNS) -> QuantizedWeight:
    """Random codes that use the whole range, with scales of both signs."""
    groups = columns // group
    codes = torch.randint(0, 2**bits, (ROWS, columns), dtype=torch.uint8)
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1
    zeros = torch.full((ROWS, groups), 2 ** (bits - 1), dtype=torch.int32)
    if not sym:
        zeros = torch.randint(1, 2**bits, (ROWS, groups), dtype=torch.int32)
        zeros[0, 0], zeros[1, 0] = 1, 2**bits - 1
    scales = (torch.randn(ROWS, groups) * 0.01).to(torch.float16)
    return QuantizedWeight(codes, scales, zeros, (torch.arange(columns) // group).int(), bits)


@pytest.mark.parametrize(
    ("bits", "sym", "expected"),
    [
        (2, True, "Q4_0"), (3, True, "Q4_0"), (4, True, "Q4_0"), (5, True, "Q5_0"),
        (6, True, "Q8_0"), (7, True, "Q8_0"), (8, True, "Q8_0"),
        (2, False, "Q4_0"), (3, False, "Q4_0"), (4, False, "Q4_1"), (5, False, "Q5_1"),
        (6, False, "Q8_0"), (7, False, "Q8_0"), (8, False, None),
    ],
)  # fmt: skip
def test_the_smallest_type_that_is_exact(bits, sym, expected):
    q = weight(bits, sym=sym)
    kind = block_type(CodeRange.of(q))
    assert (kind and kind.name) == expected
    if kind is None:
        return
    blocked = blocked_codes(q)
    assert isinstance(blocked, BlockedCodes)
    packed = pack_blocks(blocked, kind)
    assert packed.shape == (ROWS, COLUMNS // 32 * kind.nbytes)
    decoded = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind.name])
    if not kind.has_minimum:
        np.testing.assert_array_equal(decoded, q.dequantize().numpy())
        return
    d, zeros = q.scales.float()[:, q.g_idx.long()], q.zeros.float()[:, q.g_idx.long()]
    minimum = (-d * zeros).half().float()
    np.testing.assert_array_equal(decoded, (d * q.codes.float() + minimum).numpy())
    steps = (torch.from_numpy(decoded) - q.dequantize()).abs() / d.abs()
    assert float(steps.max()) < 2**bits * 2**-11


def test_types_are_those_of_the_package():
    for kind in BLOCK_TYPES:
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (32, kind.nbytes)


def test_layers_of_different_widths_share_a_type():
    narrow, wide = CodeRange.of(weight(3, sym=True)), CodeRange.of(weight(8, sym=True))
    assert block_type(narrow.join(wide)).name == "Q8_0"
    assert block_type(CodeRange.of(weight(4, sym=False)).join(wide)).name == "Q8_0"


def test_what_is_not_in_blocks_is_said():
    assert "not in one group" in blocked_codes(weight(4, sym=True, group=16))
    assert "not in one group" in blocked_codes(weight(4, sym=True, group=48))
    assert "48 input channels" in blocked_codes(weight(4, sym=True, group=48, columns=48))
    q = weight(4, sym=True)
    act_order = QuantizedWeight(q.codes, q.scales, q.zeros, q.g_idx.flip(0)[torch.randperm(192)], 4)
    assert "not in one group" in blocked_codes(act_order)
    large = QuantizedWeight(q.codes, q.scales.float() * 1e10, q.zeros, q.g_idx, 4)
    assert "float16 cannot hold" in blocked_codes(large)
    small = QuantizedWeight(q.codes, q.scales.float() * 1e-10, q.zeros, q.g_idx, 4)
    assert "float16 cannot hold" in blocked_codes(small)
    q.scales[2] = 0  # a row without weights, as some tools write it
    assert isinstance(blocked_codes(q), BlockedCodes)


def test_columns_are_permuted_by_whole_blocks():
    q = weight(4, sym=True)
    columns = torch.arange(COLUMNS).reshape(6, 32).flip(0).reshape(-1)
    blocked = blocked_codes(q, columns)
    assert isinstance(blocked, BlockedCodes)
    decoded = gguf.quants.dequantize(
        pack_blocks(blocked, BLOCK_TYPES[0]).numpy(), gguf.GGMLQuantizationType.Q4_0
    )
    np.testing.assert_array_equal(decoded, q.dequantize()[:, columns].numpy())
    assert "not in one group" in blocked_codes(q, torch.arange(COLUMNS).flip(0).roll(5))
