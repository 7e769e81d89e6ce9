"""Engines refuse what they do not support; fused layers and tensor parallelism."""

import re
from dataclasses import replace

import pytest

import roundwise as rw
from roundwise.checkpoint.engines import (
    ServedLayer,
    conflicting_packed_modules,
    expert_naming,
    ignore_patterns,
    packed_modules,
    served_by,
    tensor_parallel_degrees,
    with_packed_names,
)

#: The layer that every engine serves.
COMMON = ServedLayer(bits=4, group_size=128, sym=True, desc_act=False, format="gptq")


def refusing(**changes) -> set[str]:
    return {engine for engine, why in served_by([replace(COMMON, **changes)]).items() if why}


@pytest.mark.parametrize(
    ("changes", "engines"),
    [
        ({}, set()),
        ({"bits": 8}, {"vLLM, CPU", "ExLlamaV2"}),
        ({"bits": 3}, {"vLLM, CPU", "vLLM, GPU (Marlin)", "SGLang", "ExLlamaV2"}),
        ({"sym": False, "format": "gptq_v2"}, {"vLLM, CPU", "vLLM, GPU (Marlin)", "SGLang"}),
        ({"sym": False}, {"vLLM, CPU", "vLLM, GPU (Marlin)", "SGLang", "GPTQModel"}),
        ({"desc_act": True}, {"vLLM, CPU", "vLLM, GPU (Marlin)", "SGLang"}),
        ({"group_size": 16}, {"vLLM, CPU", "vLLM, GPU (Marlin)", "SGLang"}),
        ({"expert_naming": "gate_proj"}, {"vLLM, CPU"}),
        ({"expert_naming": "w1"}, {"vLLM, CPU", "GPTQModel"}),
        ({"expert_naming": "fused"}, {"vLLM, CPU", "vLLM, GPU (Marlin)", "SGLang"}),
        ({"expert_naming": "mixed"}, {"vLLM, CPU", "vLLM, GPU (Marlin)", "SGLang"}),
        ({"conflicting_module": "a.qkv_proj"}, {"vLLM, CPU", "vLLM, GPU (Marlin)", "SGLang"}),
    ],
)
def test_unsupported_settings_are_refused(changes, engines):
    assert refusing(**changes) == engines


@pytest.mark.parametrize(
    ("changes", "engine", "way"),
    [
        ({"bits": 3}, "vLLM, GPU (Marlin)", "; it takes them with --quantization humming"),
        ({"bits": 2}, "vLLM, GPU (Marlin)",
         "humming or after `roundwise convert --to compressed-tensors`"),
        ({"sym": False}, "vLLM, GPU (Marlin)", "humming or after `roundwise convert"),
        ({"sym": False}, "vLLM, CPU", "; it takes them after `roundwise convert"),
        ({"sym": False}, "SGLang", "humming or after `roundwise convert"),
        ({"bits": 2}, "SGLang", "; it takes them with --quantization humming"),
    ],
)  # fmt: skip
def test_the_way_in_which_an_engine_takes_it_after_all(changes, engine, way):
    assert way in served_by([replace(COMMON, **changes)])[engine]


@pytest.mark.parametrize(
    ("changes", "engine"),
    [({"bits": 8}, "vLLM, CPU"), ({"desc_act": True}, "vLLM, GPU (Marlin)"), ({"bits": 3}, "ExLlamaV2")],
)  # fmt: skip
def test_what_no_way_helps(changes, engine):
    assert "it takes them" not in served_by([replace(COMMON, **changes)])[engine]


def test_one_refused_layer_refuses_the_model():
    assert served_by([COMMON, replace(COMMON, bits=8)])["ExLlamaV2"] is not None


def test_only_complete_fused_layers_count():
    attention = [f"a.{part}_proj" for part in "qkv"]
    assert list(packed_modules([*attention, "b.q_proj", "b.k_proj", "gate_proj", "up_proj"])) == [
        ("a.qkv_proj", attention),
        ("gate_up_proj", ["gate_proj", "up_proj"]),
    ]
    assert with_packed_names(["a.o_proj", *attention]) == ["a.o_proj", *attention, "a.qkv_proj"]


def test_fused_layers_whose_members_differ_are_named():
    names = [f"{i}.{part}_proj" for i in range(2) for part in "qkv"]
    config = rw.QuantizeConfig(dynamic={r"1\.v_proj": {"bits": 8}})
    assert conflicting_packed_modules(config, names) == ["1.qkv_proj"]


def test_naming_of_experts():
    assert expert_naming("w3", fused=False) == "w1"
    assert expert_naming("up_proj", fused=False) == "gate_proj"
    assert expert_naming("up_proj", fused=True) == "fused"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "down", "group", "degrees"),
    [
        (32, 8, 14336, 128, [1, 2, 4, 8, 16]),  # Llama 3 8B: 14336 / 32 is not a multiple of 128
        (32, 8, 14336, 64, [1, 2, 4, 8, 16, 32]),
        (32, 32, 11008, 128, [1, 2]),  # Llama 2 7B: 11008 = 86 groups of 128
        (12, 12, 14336, 128, [1, 2, 4]),
        (32, 8, 14336, -1, [1, 2, 4, 8, 16, 32]),
    ],
)
def test_tensor_parallelism_needs_whole_groups_and_heads(heads, kv_heads, down, group, degrees):
    linears = [(4096, 4096, group), (1024, 4096, group), (down, 4096, group), (4096, down, group)]
    assert tensor_parallel_degrees(linears, hidden=4096, heads=heads, kv_heads=kv_heads) == degrees


def test_patterns_of_ignored_modules_match_no_quantized_layer():
    quantized = ["model.layers.1.up", "decoder.layers.2.up"]
    assert ignore_patterns(["model.layers.61", "mtp", "model.vision"], quantized) == {
        "model.layers.61": r".*layers\.61\..*", "mtp": ".*mtp.*", "model.vision": r".*vision\..*",
    }  # fmt: skip
    narrow = ignore_patterns(["model.layers.2"], quantized)["model.layers.2"]
    assert re.match(narrow, "model.layers.2.up") and re.match(narrow, "model.layers.2")
    assert not any(re.match(narrow, name) for name in (*quantized, "model.layers.21.up"))
