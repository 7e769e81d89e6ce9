"""Tensors and settings of the GPTQ format are written and read back exactly."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import roundwise as rw
from roundwise.checkpoint.formats import shape_problem
from roundwise.checkpoint.gptq_format import (
    LayerSettings,
    config_from_settings,
    decode,
    encode,
    packed_bytes,
    quantization_config,
    settings_from_weight,
)

OUT, IN = 32, 96


def solved(seed: int, config: rw.QuantizeConfig) -> rw.QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(2 * IN, IN, generator=generator) * torch.rand(IN, generator=generator)
    return rw.solve(torch.randn(OUT, IN, generator=generator), X.T @ X, config)


def code(words: torch.Tensor, index: int, bits: int) -> int:
    """Code `index` of packed words, from the bit stream that docs/format.md describes."""
    stream = b"".join((int(word) & 0xFFFFFFFF).to_bytes(4, "little") for word in words)
    return int.from_bytes(stream, "little") >> (bits * index) & (2**bits - 1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    sym=st.booleans(),
    version=st.sampled_from(["gptq", "gptq_v2"]),
    group_size=st.sampled_from([-1, 16, 32]),
    desc_act=st.booleans(),
)
def test_encode_and_decode_are_inverse(seed: int, **options: Any) -> None:
    config = rw.QuantizeConfig(**{"format": options.pop("version"), **options})
    q = solved(seed, config)
    groups = config.columns_per_group(IN)
    back = decode(encode(q, config), config.format, bits=config.bits, group_size=groups)
    assert back.bits == config.bits
    for field in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(back, field), getattr(q, field))
    assert torch.equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_the_bits_are_where_the_format_says(bits: int, version: str) -> None:
    config = rw.QuantizeConfig(bits=bits, group_size=32, sym=False, format=version)
    q = solved(1, config)
    tensors = encode(q, config)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, (IN * bits // 32, OUT)),
        "qzeros": (torch.int32, (3, OUT * bits // 32)),
        "scales": (torch.float16, (3, OUT)),
        "g_idx": (torch.int32, (IN,)),
    }
    offset = 1 if version == "gptq" else 0
    for n in (0, 7, OUT - 1):
        for k in (0, 10, 21, 31, 32, IN - 1):
            assert code(tensors["qweight"][:, n], k, bits) == int(q.codes[n, k])
        for g in range(3):
            assert code(tensors["qzeros"][g], n, bits) == (int(q.zeros[n, g]) - offset) % 2**bits
            assert tensors["scales"][g, n] == q.scales[n, g]


def test_symmetric_4_bit_v1_zeros_are_all_sevens() -> None:
    config = rw.QuantizeConfig(group_size=32)
    assert set(encode(solved(2, config), config)["qzeros"].flatten().tolist()) == {0x77777777}


def test_asymmetric_v1_never_stores_a_zero_point_of_zero() -> None:
    # Readers that add 1 without wrapping would read 2^bits.
    config = rw.QuantizeConfig(group_size=32, sym=False, format="gptq")
    X = torch.randn(2 * IN, IN)
    q = rw.solve(torch.rand(OUT, IN) + 0.5, X.T @ X, config)
    assert int(q.zeros.min()) >= 1


@pytest.mark.parametrize(
    ("shape", "options", "problem"),
    [
        ((64, 80), {"group_size": 32}, "group_size=32 does not divide 80 input channels"),
        ((64, 48), {"bits": 3, "group_size": 16}, "3-bit .* multiples of 32, which 64 x 48 is not"),
        ((40, 64), {"bits": 3, "group_size": 32}, "3-bit .* multiples of 32, which 40 x 64 is not"),
        ((12, 64), {"group_size": 32}, "4-bit .* multiples of 8, which 12 x 64 is not"),
        ((64, 96), {"group_size": 32}, None),
        ((8, 8), {"group_size": -1}, None),
        ((32, 32), {"bits": 3, "group_size": 16}, None),
        ((4, 16), {"bits": 8, "group_size": 8}, None),
    ],
)
def test_sizes_that_can_be_stored(
    shape: tuple[int, int], options: dict[str, Any], problem: str | None
) -> None:
    found = shape_problem(*shape, rw.QuantizeConfig(**options))
    assert found is None if problem is None else re.match(problem, found or "")


def test_g_idx_is_optional() -> None:
    config = rw.QuantizeConfig(group_size=32)
    q = solved(3, config)
    tensors = encode(q, config)
    del tensors["g_idx"]
    assert torch.equal(decode(tensors, "gptq", bits=4, group_size=32).g_idx, q.g_idx)


def test_a_layer_is_skipped_in_every_block_unless_another_block_quantizes_it() -> None:
    config = rw.QuantizeConfig()
    skipped, linears = ["0.gate", "1.gate", "0.fc"], ["1.fc", "0.up", "1.up"]
    written = quantization_config(config, true_sequential=True, skipped=skipped, linears=linears)
    assert written["dynamic"] == {r"-:.*\d+\.gate$": {}, r"-:.*0\.fc$": {}}
    assert not any(re.match(rule[2:], name) for rule in written["dynamic"] for name in linears)


def test_overrides_are_written_for_readers_that_match_from_the_start() -> None:
    config = rw.QuantizeConfig(dynamic={"k_proj|v_proj": {"bits": 8}, r"layers\.0\.": None})
    dynamic = quantization_config(config, true_sequential=True)["dynamic"]
    assert dynamic == {"+:.*(?:k_proj|v_proj)": {"bits": 8}, r"-:.*(?:layers\.0\.)": {}}
    for pattern in dynamic:
        assert re.match(pattern[2:], "model.layers.0.self_attn.v_proj")


@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [
        ({r"attn\.(q|k|v)_proj": {"group_size": 32}}, 32),
        ({r"attn\.(q|k|v)_proj": None}, None),
        ({r"attn\.v_proj": {"group_size": 32}}, 128),  # members that differ are not fused
        ({"o_proj": {"group_size": 32}}, 128),
        ({}, 128),
    ],
)
def test_fused_layers_are_found_by_their_fused_name(
    dynamic: dict[str, Any], expected: int | None
) -> None:
    """vLLM uses the first rule that matches from the start of the fused name."""
    names = [f"model.layers.{i}.attn.{p}_proj" for i in range(2) for p in "qkvo"]
    config = rw.QuantizeConfig(group_size=128, dynamic=dynamic)
    settings = quantization_config(config, true_sequential=True, linears=names)

    def looked_up(name: str) -> int | None:
        for rule, changes in settings.get("dynamic", {}).items():
            if re.match(rule[2:], name):
                return None if rule.startswith("-:") else int(changes["group_size"])
        return 128

    assert {looked_up(f"model.layers.{i}.attn.qkv_proj") for i in range(2)} == {expected}
    for name in names:
        own = config.for_module(name)
        assert looked_up(name) == (None if own is None else own.group_size)


@pytest.mark.parametrize(
    "settings",
    [
        LayerSettings(bits=4, group_size=32, sym=True, desc_act=False),
        LayerSettings(bits=3, group_size=-1, sym=True, desc_act=False),
        LayerSettings(bits=8, group_size=16, sym=False, desc_act=True),
    ],
)
def test_settings_are_inferred_from_a_weight(settings: LayerSettings) -> None:
    q = solved(4, rw.QuantizeConfig(**{**asdict(settings), "format": "gptq_v2"}))
    assert settings_from_weight(q) == settings


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_packed_bytes_are_those_of_the_tensors(bits: int, group_size: int) -> None:
    config = rw.QuantizeConfig(bits=bits, group_size=group_size)
    tensors = encode(solved(5, config), config)
    assert packed_bytes(OUT, IN, config) == sum(tensor.nbytes for tensor in tensors.values())


def test_the_most_common_settings_are_the_default() -> None:
    usual = LayerSettings(bits=4, group_size=32, sym=True, desc_act=False)
    wide = LayerSettings(bits=8, group_size=32, sym=True, desc_act=False)
    layers = {
        "0.q_proj": wide, "0.k_proj": wide, "0.v_proj": wide,
        "0.o_proj": usual, "1.o_proj": usual, "2.o_proj": usual, "3.o_proj": usual,
    }  # fmt: skip
    config = config_from_settings(layers, "gptq_v2", ["0.fc", "1.fc"], lm_head=False)
    assert {key: config[key] for key in asdict(usual)} == asdict(usual)
    assert (config["checkpoint_format"], config["lm_head"]) == ("gptq_v2", False)
    assert config["dynamic"] == {
        r"-:.*\d+\.fc$": {},
        r"+:(?:0\.q_proj|0\.k_proj|0\.v_proj|0\.qkv_proj)$": asdict(wide),
    }
