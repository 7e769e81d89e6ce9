"""Conversion is exact, and refuses what the target format cannot express."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import roundwise as rw
from roundwise import convert as module
from roundwise.checkpoint.quantized_layers import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.convert import convert
from roundwise.errors import ConfigError
from roundwise.verify import audit
from tests.helpers import raw, tensors_of


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {layer.name: layer.read().dequantize() for layer in quantized_layers(checkpoint)}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_v1_to_v2_and_back_is_exact(bits, sym, quantized, tmp_path):
    source = quantized("llama", bits=bits, sym=sym, format="gptq", recipe="textbook")
    convert(source, tmp_path / "v2", "gptq_v2")
    before, after = decoded(source), decoded(tmp_path / "v2")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not audit(tmp_path / "v2").failures
    convert(tmp_path / "v2", tmp_path / "v1", "gptq")
    old, new = tensors_of(source), tensors_of(tmp_path / "v1")
    assert old.keys() == new.keys()
    assert all(raw(old[name]) == raw(new[name]) for name in old)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("desc_act", [False, True])
def test_dense_weights_are_the_decoded_ones(name, desc_act, quantized, tmp_path):
    source = quantized(name, desc_act=desc_act, recipe="textbook")
    convert(source, tmp_path / "dense", "dense", dtype=torch.float32)
    ids = torch.arange(12)[None]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    packed, _ = rw.load(source, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, packed(ids).logits, rtol=1e-3, atol=1e-3)
    weights = tensors_of(tmp_path / "dense")
    for layer, W in decoded(source).items():
        stored = weights[f"{layer}.weight"]
        assert torch.equal(stored, W) or torch.equal(stored.T, W)


def test_in_many_shards_with_an_index(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    source = quantized("llama", recipe="textbook")
    convert(source, tmp_path / "dense", "dense")
    checkpoint = Checkpoint(tmp_path / "dense")
    assert len(checkpoint.files) > 3
    assert {info.dtype for info in checkpoint.tensors.values()} == {"F32"}  # as its config says
    rw.load(tmp_path / "dense")


def test_a_zero_point_of_0_is_refused_for_v1(copy_of, tmp_path):
    folder = copy_of("llama")  # with a weight that has no negative value
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].abs()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = tmp_path / "v2"
    rw.quantize(folder, source, rw.QuantizeConfig(method="rtn", sym=False, group_size=32))
    zeros = [layer.read().zeros for layer in quantized_layers(Checkpoint(source))]
    assert any(bool((zero == 0).any()) for zero in zeros)
    with pytest.raises(ConfigError, match="zero point of 0"):
        convert(source, tmp_path / "v1", "gptq")
    assert not (tmp_path / "v1" / "config.json").exists()
