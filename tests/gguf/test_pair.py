"""A checkpoint beside its original: what was changed, and files that do not belong together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.errors import CheckpointError, ConfigError
from roundwise.gguf.pair import open_pair
from tests.helpers import random_model, tensors_of, windows


def test_nothing_but_the_layers_is_changed(quantized, llama):
    pair = open_pair(quantized("llama", recipe="textbook"), None)  # from its manifest
    assert pair.changed == {} and len(pair.layers) == 14
    stored = tensors_of(llama)
    assert all(torch.equal(pair.original[name].read(), W) for name, W in stored.items())
    for name in pair.layers:
        q = pair.read(name)
        assert q.codes.shape == stored[f"{name}.weight"].shape


def test_what_a_rotation_changed(quantized, llama):
    folder = quantized("qwen3", recipe="textbook", rotate=True)
    pair = open_pair(folder, None)
    assert "model.embed_tokens.weight" in pair.changed
    assert "model.layers.0.input_layernorm.weight" in pair.changed
    assert not any("q_norm" in name for name in pair.changed)  # it is not in the residual stream
    assert pair.read("model.layers.0.mlp.up_proj").bits == 4


def test_another_model_is_not_the_original(quantized, llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    other = random_model(transformers.LlamaConfig(**config), seed=1)
    other.save_pretrained(tmp_path / "other")
    pair = open_pair(quantized("llama", recipe="textbook"), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"other is not the original: .* weight error"):
        pair.read("model.layers.0.mlp.up_proj")


def test_the_original_must_be_known(quantized, llama, tmp_path):
    source = quantized("llama", recipe="textbook")
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    (folder / "roundwise.json").unlink()
    with pytest.raises(ConfigError, match="which model it was made from: name it with --original"):
        open_pair(folder, None)
    assert open_pair(folder, llama).changed == {}
    manifest = json.loads((source / "roundwise.json").read_text())
    manifest["given"]["model"] = str(tmp_path / "gone")
    (folder / "roundwise.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"gone.*name it with --original"):
        open_pair(folder, None)
    with pytest.raises(CheckpointError, match="is not quantized"):
        open_pair(llama, llama)


def test_an_original_that_is_dequantized_while_read(quantized, tmp_path):
    first = quantized("llama", bits=8, recipe="textbook")
    out = tmp_path / "again"
    rw.quantize(first, out, rw.QuantizeConfig(group_size=32, method="rtn"), windows())
    pair = open_pair(out, None)
    name = "model.layers.0.mlp.up_proj"
    info = pair.original[f"{name}.weight"]
    assert info.dtype == "F32" and pair.changed == {}
    assert pair.read(name).codes.shape == info.shape
