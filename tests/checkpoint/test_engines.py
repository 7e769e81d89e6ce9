"""Engines refuse what they do not support; fused layers and tensor parallelism."""

import re
from dataclasses import replace

import pytest

import roundwise as rw
from roundwise.checkpoint.engines import (
    ENGINES,
    ServedLayer,
    conflicting_packed_modules,
    expert_naming,
    ignore_patterns,
    packed_modules,
    served_by,
    with_packed_names,
)

#: The layer that every engine serves.
COMMON = ServedLayer(bits=4, group_size=128, sym=True, desc_act=False, format="gptq")


def refusing(**changes) -> set[str]:
    """Engines that need something else; llama.cpp always needs its own format."""
    answers = served_by([replace(COMMON, **changes)])
    assert answers.pop("llama.cpp")
    return {engine for engine, why in answers.items() if why}


@pytest.mark.parametrize(
    ("changes", "engines"),
    [
        ({}, set()),
        ({"bits": 8}, {"vLLM, CPU", "ExLlamaV2"}),
        ({"bits": 3}, {"vLLM, CPU", "vLLM, GPU", "SGLang", "ExLlamaV2"}),
        ({"sym": False, "format": "gptq_v2"}, {"vLLM, CPU", "vLLM, GPU", "SGLang"}),
        ({"sym": False}, {"vLLM, CPU", "vLLM, GPU", "SGLang", "GPTQModel"}),
        ({"desc_act": True}, {"vLLM, CPU", "vLLM, GPU", "SGLang"}),
        ({"group_size": 16}, {"vLLM, CPU", "vLLM, GPU", "SGLang"}),
        ({"expert_naming": "gate_proj"}, {"vLLM, CPU"}),
        ({"expert_naming": "w1"}, {"vLLM, CPU", "GPTQModel"}),
        ({"expert_naming": "fused"}, {"vLLM, CPU", "vLLM, GPU", "SGLang"}),
        ({"expert_naming": "mixed"}, {"vLLM, CPU", "vLLM, GPU", "SGLang"}),
        ({"conflicting_module": "a.qkv_proj"}, {"vLLM, CPU", "vLLM, GPU", "SGLang"}),
    ],
)
def test_unsupported_settings_are_refused(changes, engines):
    assert refusing(**changes) == engines


#: What a user must do; "": nothing.
WAYS = {
    "": "", "H": "with --quantization humming", "C": "as --format compressed-tensors",
    "G": "as --format gptq", "L": "as convert --to gguf",
}  # fmt: skip
#: Settings -> for vLLM on a CPU, vLLM on a GPU, SGLang, llama.cpp, ExLlamaV2, GPTQModel and transformers
#: with roundwise: yes; no; or the letters of the ways in which they take it after all.
TRUTH = [
    ({}, "yes yes yes L yes yes yes"),
    ({"group_size": 32}, "yes yes yes L yes yes yes"),
    ({"group_size": -1}, "yes yes yes L yes yes yes"),
    ({"group_size": 16}, "C HC H no yes yes yes"),
    ({"group_size": 256}, "C HC H L yes yes yes"),
    ({"format": "gptq_v2"}, "yes yes yes L yes yes yes"),
    ({"bits": 2}, "no HC H L no yes yes"),
    ({"bits": 3}, "no HC H L no yes yes"),
    ({"bits": 8}, "no yes yes L no yes yes"),
    ({"bits": 3, "group_size": 16}, "no HC H no no yes yes"),
    ({"sym": False}, "C HC HC L yes no yes"),
    ({"sym": False, "format": "gptq_v2"}, "C HC HC L yes yes yes"),
    ({"sym": False, "bits": 2, "format": "gptq_v2"}, "no HC H L no yes yes"),
    ({"sym": False, "bits": 8, "format": "gptq_v2"}, "no HC HC no no yes yes"),
    ({"desc_act": True}, "no no no no yes yes yes"),
    ({"desc_act": True, "bits": 3}, "no no no no no yes yes"),
    ({"desc_act": True, "group_size": -1}, "yes yes yes L yes yes yes"),
    ({"sym": False, "bits": 6, "format": "gptq_v2"}, "no HC H L no no yes"),
    ({"is_head": True}, "yes yes yes L yes yes yes"),
    ({"is_head": True, "bits": 3}, "no C no L no yes yes"),
    ({"is_conv1d": True, "bits": 3}, "no H H L no yes yes"),
    ({"format": "compressed-tensors"}, "yes yes yes L G G yes"),
    ({"format": "compressed-tensors", "bits": 2}, "no yes GH L no G yes"),
    ({"format": "compressed-tensors", "bits": 3}, "no yes GH L no G yes"),
    ({"format": "compressed-tensors", "bits": 8}, "no yes yes L no G yes"),
    ({"format": "compressed-tensors", "sym": False}, "yes yes yes L G G yes"),
    ({"format": "compressed-tensors", "sym": False, "bits": 3}, "no yes GH L no G yes"),
    ({"format": "compressed-tensors", "group_size": 16}, "yes yes GH no G G yes"),
    ({"expert_naming": "gate_proj", "bits": 3}, "no HC H L no yes yes"),
    ({"expert_naming": "w1"}, "no yes yes L yes no yes"),
    ({"expert_naming": "fused"}, "no no no L yes yes yes"),
    ({"expert_naming": "mixed", "format": "compressed-tensors"}, "no no no L G G yes"),
    ({"conflicting_module": "a.qkv_proj"}, "no no no L yes yes yes"),
]


@pytest.mark.parametrize(("changes", "expected"), TRUTH, ids=[str(row[0]) for row in TRUTH])
def test_which_engine_takes_which_settings_in_which_way(changes, expected):
    answers = served_by([replace(COMMON, **changes)])
    assert [*answers] == [*ENGINES] and len(TRUTH) >= 30
    for (engine, reason), known in zip(answers.items(), expected.split(), strict=True):
        ways = reason.partition("; it takes them ")[2] if reason else None
        if known in ("yes", "no"):
            assert ways == (None if known == "yes" else ""), (engine, reason)
        else:
            # "GH" is one way: another format and an option.
            groups = ["GH"] if known == "GH" else [*known]
            expected_ways = [" ".join(WAYS[letter] for letter in group) for group in groups]
            assert ways == " or ".join(expected_ways), (engine, reason)


def test_llama_cpp_says_what_does_not_fit_its_blocks():
    def reason(**changes) -> str:
        return served_by([replace(COMMON, **changes)])["llama.cpp"]

    assert "groups of 48 do not fill its blocks of 32" in reason(group_size=48)
    assert "asymmetric codes of 8 bits" in reason(bits=8, sym=False, format="gptq_v2")
    assert "no act-order files" in reason(desc_act=True)
    assert reason() == "it does not read files in this format; it takes them as convert --to gguf"


def test_a_way_must_help_all_layers():
    both = [replace(COMMON, bits=3), replace(COMMON, sym=False, bits=8)]
    assert served_by(both)["SGLang"].endswith("; it takes them with --quantization humming")
    assert "it takes them" not in served_by([*both, replace(COMMON, desc_act=True)])["SGLang"]


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
    assert conflicting_packed_modules(config.for_module, names) == ["1.qkv_proj"]


def test_naming_of_experts():
    assert expert_naming("w3", fused=False) == "w1"
    assert expert_naming("up_proj", fused=False) == "gate_proj"
    assert expert_naming("up_proj", fused=True) == "fused"
    assert expert_naming("up_proj", fused=True, family="qwen3_5_moe_text") == "gate_proj"


def test_patterns_of_ignored_modules_match_no_quantized_layer():
    quantized = ["model.layers.1.up", "decoder.layers.2.up"]
    assert ignore_patterns(["model.layers.61", "mtp", "model.vision"], quantized) == {
        "model.layers.61": r".*layers\.61\..*", "mtp": ".*mtp.*", "model.vision": r".*vision\..*",
    }  # fmt: skip
    narrow = ignore_patterns(["model.layers.2"], quantized)["model.layers.2"]
    assert re.match(narrow, "model.layers.2.up") and re.match(narrow, "model.layers.2")
    assert not any(re.match(narrow, name) for name in (*quantized, "model.layers.21.up"))
