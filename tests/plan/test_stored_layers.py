"""Layers of a finished checkpoint look to engines as `plan` said."""

import pytest

import roundwise as rw
from roundwise.checkpoint.engines import served_by
from roundwise.checkpoint.quantized_layers import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.model.streamed import open_streamed_model
from roundwise.plan.plan import served_layers
from roundwise.plan.stored_layers import stored_layers


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}), ("llama", {"desc_act": True}), ("llama", {"group_size": -1}),
        ("llama", {"format": "compressed-tensors", "sym": False}),
        ("llama", {"dynamic": {"q_proj": {"bits": 8}}}), ("gpt2", {"sym": False}),
        ("mixtral", {}), ("qwen3_moe", {"dynamic": {r"experts\.0\.": {"bits": 8}}}),
        ("gpt_oss", {}),
    ],
)  # fmt: skip
def test_the_same_as_before_the_run(name, settings, quantized, folder_of):
    config = rw.QuantizeConfig(**{"group_size": 32, "recipe": "textbook", **settings})
    planned = served_by(served_layers(open_streamed_model(folder_of(name)), config))
    checkpoint = Checkpoint(quantized(name, recipe="textbook", **settings))
    layers = quantized_layers(checkpoint)
    stored = stored_layers(layers, checkpoint.config["model_type"], fused_experts=name == "gpt_oss")
    assert served_by(stored) == planned


def test_no_layers():
    assert [*stored_layers([], "llama")] == []


def test_towers_are_a_layer_of_their_own(quantized):
    layers = quantized_layers(Checkpoint(quantized("llama", recipe="textbook")))
    stored = [*stored_layers(layers, "llama", towers=True)]
    assert [layer.is_tower for layer in stored] == [False] * len(layers) + [True]
    assert served_by(stored)["vLLM, GPU"]
