"""Every tensor of the model has its name and value in the files, as transformers itself loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.transformed_view import ComputedInfo
from roundwise.checkpoint.writer import write_safetensors
from roundwise.errors import CheckpointError
from roundwise.model.build import build, load_config
from roundwise.model.conversions import converted_checkpoint, map_tensor_names
from roundwise.model.streamed import open_streamed_model
from tests.helpers import ARCHITECTURES, LLAMA, random_model, raw, tensors_of
from tests.matrix.tiny import find, tiny_model

#: Classes whose files transformers cuts, joins, permutes, joins expert by expert, or computes parts of.
CONVERTED = {
    "NomicBertModel": "layers.0.self_attn.q_proj.weight",
    "HrmTextForCausalLM": "model.L_module.layers.0.self_attn.gate_proj.weight",
    "OlmoHybridForCausalLM": "model.layers.0.linear_attn.conv1d.weight",
    "DeepseekV4ForCausalLM": "model.norm.weight",
    "MarianMTModel": "model.encoder.embed_positions.weight",
    "Kimi_K25ForConditionalGeneration": "model.vision_tower.layers.0.attn.q_proj.weight",
    "Step3p7ForConditionalGeneration": "model.vision_model.layers.0.self_attn.q_proj.weight",
    "Qwen4ExpForCausalLM": "model.layers.0.ple.ple_embedding.ngram_embedding.weight",
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_files_as_transformers_writes_them(name: str, folder_of: Callable[[str], Path]) -> None:
    streamed = open_streamed_model(folder_of(name))
    names = map_tensor_names(streamed.model, streamed.checkpoint)
    stored = streamed.checkpoint.tensors
    for key, parameter in streamed.model.named_parameters(remove_duplicate=False):
        assert names[key] in stored
        assert names[key] == key or key in ("lm_head.weight",)
        assert stored[names[key]].shape == tuple(parameter.shape)
    assert converted_checkpoint(streamed.model, streamed.checkpoint) is streamed.checkpoint


@pytest.mark.parametrize("name", CONVERTED)
def test_values_are_those_that_transformers_loads(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    expected = find(name).from_pretrained(tmp_path).state_dict()
    streamed = open_streamed_model(tmp_path, dtype=torch.float32)
    streamed.load(streamed.model, "")
    loaded = streamed.model.state_dict()
    assert CONVERTED[name] in expected
    for key, value in expected.items():
        if ".experts." not in key:
            torch.testing.assert_close(loaded[key], value, rtol=0, atol=0)


def test_experts_that_are_joined_by_rows(tmp_path: Path) -> None:
    name = "Step3p7ForConditionalGeneration"
    tiny_model(name).save_pretrained(tmp_path)
    model = find(name).from_pretrained(tmp_path)
    view = open_streamed_model(tmp_path).checkpoint
    (path, experts) = next(
        (path, module) for path, module in model.named_modules() if path.endswith("mlp.experts")
    )
    gate, up = experts.gate_up_proj[1].chunk(2)
    slices = {n: i for n, i in view.tensors.items() if ".experts.1." in n}
    found = [info.read() for n, info in slices.items() if path.split("layers.")[1] in n]
    assert any(torch.equal(value, gate) for value in found)
    assert any(torch.equal(value, up) for value in found)


@pytest.fixture(scope="module")
def nomic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nomic")
    tiny_model("NomicBertModel").save_pretrained(folder)
    return folder


def test_a_computed_tensor_can_be_read_in_parts(nomic: Path) -> None:
    view = open_streamed_model(nomic).checkpoint
    info = view.tensors["encoder.layers.0.self_attn.k_proj.weight"]
    whole = tensors_of(nomic)["encoder.layers.0.attn.Wqkv.weight"][64:128]
    assert isinstance(info, ComputedInfo)
    assert [*info.origins] == ["encoder.layers.0.attn.Wqkv.weight"]
    assert torch.equal(info.read(), whole)
    assert torch.equal(info.rows(3, 5).read(), whole[3:8])
    assert b"".join(info.chunks()) == raw(whole)


def test_what_is_not_quantized_goes_out_as_it_came(nomic: Path, tmp_path: Path) -> None:
    left = r"(layers\.0\.self_attn\.[qkv]|layers\.1\.self_attn\.k)_proj"
    rw.quantize(
        nomic,
        tmp_path / "out",
        rw.QuantizeConfig(method="rtn", group_size=32, dynamic={left: None}),
    )
    before, after = tensors_of(nomic), tensors_of(tmp_path / "out")
    first, second = "encoder.layers.0.attn.Wqkv.weight", "encoder.layers.1.attn.Wqkv.weight"
    assert torch.equal(after[first], before[first])
    # Two of the three layers in it are quantized, so the third has a tensor of its own.
    assert second not in after
    k_proj = after["encoder.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(k_proj, before[second][64:128])
    assert "encoder.layers.1.self_attn.q_proj.qweight" in after
    rw.load(tmp_path / "out")


def test_tensors_that_cannot_be_converted_are_named(nomic: Path, tmp_path: Path) -> None:
    tensors = tensors_of(nomic)
    tensors["encoder.layers.0.attn.Wqkv.weight"] = torch.zeros(())
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_bytes((nomic / "config.json").read_bytes())
    checkpoint = Checkpoint(tmp_path)
    model = build(load_config(checkpoint), torch.float32)
    with pytest.raises(CheckpointError, match=r"cannot convert encoder\.layers\.0\.attn\.Wqkv"):
        converted_checkpoint(model, checkpoint)


def test_a_base_model_has_no_prefix_in_its_files(tmp_path: Path) -> None:
    model = random_model(ARCHITECTURES["gpt2"].config())
    model.transformer.save_pretrained(tmp_path)
    names = map_tensor_names(model, Checkpoint(tmp_path))
    assert names["transformer.h.1.mlp.c_fc.weight"] == "h.1.mlp.c_fc.weight"
    assert names["lm_head.weight"] == "wte.weight"  # tied


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = random_model(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    names = map_tensor_names(model, Checkpoint(tmp_path))
    assert names["lm_head.weight"] == "model.embed_tokens.weight"


def test_missing_tensors_are_named(llama: Path) -> None:
    model, checkpoint = open_streamed_model(llama).model, Checkpoint(llama)
    for index in (0, 1):
        for layer in ("gate_proj", "up_proj"):
            del checkpoint.tensors[f"model.layers.{index}.mlp.{layer}.weight"]
    with pytest.raises(
        CheckpointError,
        match=r"lacks model\.layers\.0\.mlp\.gate_proj\.weight, .* and 1 more, which",
    ):
        map_tensor_names(model, checkpoint)


def test_a_shape_that_differs_from_the_config(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"vocab_size": 128', '"vocab_size": 96'))
    with pytest.raises(CheckpointError, match=r"has shape \[128, 64\].*requires \[96, 64\]"):
        open_streamed_model(folder).load_outside_blocks()
