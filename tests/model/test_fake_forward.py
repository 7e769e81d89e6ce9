"""A forward on fake tensors tells which linears are called, and which share an input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.model.fake_forward import CallTrace, drop_uncalled_linears, trace_calls
from roundwise.model.streamed import open_streamed_model
from tests.helpers import ARCHITECTURES
from tests.matrix.tiny import tiny_model

CONFIG = rw.QuantizeConfig()


def saved(folder: Path, family: str) -> Path:
    tiny_model(family).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linears_that_read_one_input_have_the_same_first(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    streamed = open_streamed_model(folder_of(name))
    calls = trace_calls(streamed, CONFIG)
    assert calls.first_reader == {
        f"{block.name}.{linear}": f"{block.name}.{group[0]}"
        for block in streamed.blocks
        for group in ARCHITECTURES[name].groups
        for linear in group
    }
    assert calls.repeated == ()
    assert all(p.device.type == "meta" for p in streamed.model.parameters())


def test_linears_that_a_block_calls_twice_are_skipped(tmp_path: Path) -> None:
    streamed = open_streamed_model(saved(tmp_path, "T5Gemma2ForConditionalGeneration"))
    calls = drop_uncalled_linears(streamed, CONFIG)
    # The decoder's attention reads its own states and the encoder's with the same layers.
    twice = {
        f"model.decoder.layers.{index}.self_attn.{name}_proj" for index in (0, 1) for name in "kv"
    }
    assert calls.repeated_in_block == twice
    for block in streamed.blocks:
        for name in twice & block.skipped_linears.keys():
            assert "more than once" in block.skipped_linears[name]
            assert name not in block.linears
    assert twice <= {name for block in streamed.blocks for name in block.skipped_linears}


@pytest.mark.parametrize(("experts", "inputs"), [("routed", 4), ("all", 1)])
def test_experts_share_an_input_only_if_each_gets_all_tokens(
    experts: Any, inputs: int, folder_of: Callable[[str], Path]
) -> None:
    streamed = open_streamed_model(folder_of("mixtral"))
    first = trace_calls(streamed, rw.QuantizeConfig(experts=experts)).first_reader
    path = "model.layers.0.mlp.experts"
    gates = [f"{path}.{expert}.w1" for expert in range(4)]
    assert len({first[gate] for gate in gates}) == inputs
    assert all(first[f"{path}.{e}.w3"] == first[gates[e]] for e in range(4))


def test_a_weight_that_is_used_without_a_call_is_skipped(tmp_path: Path) -> None:
    streamed = open_streamed_model(saved(tmp_path, "MambaForCausalLM"))
    drop_uncalled_linears(streamed, CONFIG)
    for block in streamed.blocks:
        assert not any("dt_proj" in name for name in block.linears)
        assert block.skipped_linears[f"{block.name}.mixer.dt_proj"] == (
            "the model never calls it, but may read its weight"
        )


def test_blocks_that_text_does_not_reach_are_skipped(tmp_path: Path) -> None:
    streamed = open_streamed_model(saved(tmp_path, "MllamaForConditionalGeneration"))
    drop_uncalled_linears(streamed, CONFIG)
    (skipped,) = streamed.skipped_blocks
    assert ".layers.1" in skipped.name
    assert not skipped.linears
    assert set(skipped.skipped_linears.values()) == {
        "the model does not call its block for text alone"
    }
    assert skipped.name not in [block.name for block in streamed.blocks]


def test_layers_that_are_called_several_times(tmp_path: Path) -> None:
    streamed = open_streamed_model(saved(tmp_path, "AlbertForMaskedLM"))
    calls = trace_calls(streamed, CONFIG)
    assert set(calls.repeated) == set(streamed.blocks[0].linears)


def test_a_forward_that_depends_on_values_tells_nothing(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = transformers.models.llama.modeling_llama.LlamaMLP.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return original(self, x) if float(x.sum()) > 0 else x

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", forward)
    streamed = open_streamed_model(llama)
    before = [list(block.linears) for block in streamed.blocks]
    assert drop_uncalled_linears(streamed, CONFIG) == CallTrace()
    assert [list(block.linears) for block in streamed.blocks] == before
    assert streamed.skipped_blocks == []


TEXT = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]},
}  # fmt: skip


def picture_inputs() -> dict[str, torch.Tensor]:
    """Tokens and pixels of one picture of 4 x 4 patches, whose sizes the tower reads as numbers."""
    return {
        "input_ids": torch.tensor([[1, 50, 51, 51, 51, 51, 52, 2]]),
        "pixel_values": torch.randn(16, 2 * 3 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]]),
    }


def save_seeing_model(folder: Path) -> Path:
    """A small Qwen2.5-VL with random weights."""
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT,
        vision_config={
            "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 64, "depth": 2,
            "num_heads": 2, "fullatt_block_indexes": [1],
        },
        vision_start_token_id=50, image_token_id=51, video_token_id=53, vision_end_token_id=52,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


class TestTowers:
    """Fake forwards with pictures: sizes and places of pictures have values, all else has none."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return save_seeing_model(tmp_path)

    def test_every_linear_of_the_tower_is_called(self, model: Path) -> None:
        streamed = open_streamed_model(model, include_towers=True)
        calls = trace_calls(streamed, CONFIG, picture_inputs())
        names = [name for block in streamed.blocks for name in block.linears]
        assert {*calls.first_reader} == {*names}
        first = next(name for name in names if name.endswith("gate_proj"))
        assert calls.first_reader[first.replace("gate_proj", "up_proj")] == first
        assert not trace_calls(streamed, CONFIG).first_reader.keys() & {
            name for block in streamed.blocks if block.is_tower for name in block.linears
        }

    def test_linears_that_pictures_do_not_reach_are_skipped(self, model: Path) -> None:
        streamed = open_streamed_model(model, include_towers=True)
        text = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
        drop_uncalled_linears(streamed, CONFIG, [text])
        assert not any(block.is_tower for block in streamed.blocks)
        reasons = {r for block in streamed.skipped_blocks for r in block.skipped_linears.values()}
        assert reasons == {
            "the model does not call its block for the pictures or sounds of the calibration"
        }
