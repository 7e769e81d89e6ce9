"""Packing is exact and puts bits where the format says; a weight is dequantized as the format says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roundwise.core.quantized_weight import ROWS, QuantizedWeight, codes_per_block, pack, unpack
from roundwise.errors import ConfigError


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    blocks=st.integers(1, 5),
    columns=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_unpack_inverts_pack(bits: int, blocks: int, columns: int, seed: int) -> None:
    rows = blocks * codes_per_block(bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    words = pack(codes, bits)
    assert words.shape == (rows * bits // 32, columns)
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_words_are_one_little_endian_bit_stream(bits: int) -> None:
    n = codes_per_block(bits)
    codes = torch.randint(0, 2**bits, (n, 1), generator=torch.Generator().manual_seed(bits))
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[:, 0]))
    words = [stream >> (32 * w) & 0xFFFFFFFF for w in range(n * bits // 32)]
    assert [int(word) & 0xFFFFFFFF for word in pack(codes, bits)[:, 0]] == words


def test_the_symmetric_zero_point_of_v1_is_sevens() -> None:
    assert [hex(int(w)) for w in pack(torch.full((8, 1), 7), 4)[:, 0]] == ["0x77777777"]


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ConfigError, match="multiples of 32, not 40"):
        pack(torch.zeros(40, 1), 3)
    with pytest.raises(ConfigError, match="outside 0 … 7"):
        pack(torch.full((32, 1), 8), 3)
    with pytest.raises(ConfigError, match="bits=9"):
        codes_per_block(9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weight_is_scale_times_code_minus_zero(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    out, width, groups = ROWS + 3, 12, 3
    q = QuantizedWeight(
        codes=torch.randint(0, 16, (out, width), generator=generator).to(torch.uint8),
        scales=torch.randn(out, groups, generator=generator).to(torch.float16),
        zeros=torch.randint(0, 16, (out, groups), generator=generator).to(torch.int32),
        g_idx=torch.randint(0, groups, (width,), generator=generator).to(torch.int32),
        bits=4,
    )
    group = q.g_idx.long()
    expected = q.scales.double()[:, group] * (q.codes.double() - q.zeros.double()[:, group])
    found = q.dequantize(dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
