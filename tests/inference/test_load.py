"""`roundwise.load` loads GPTQ checkpoints of all widths, versions and layouts; others are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.checkpoint.quantized_layers import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import CheckpointError, ConfigError
from roundwise.inference.load import parse_dtype, require_tokenizer
from roundwise.inference.quant_linear import QuantLinear
from tests.helpers import assign, edited_json, tensors_of
from tests.inference.checkpoints import logits, rewritten

WIDTHS = pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])


def dense_logits(source: Path, checkpoint: Path, version: str) -> torch.Tensor:
    """Logits of the source model with the dequantized weights of the checkpoint."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    for layer in quantized_layers(Checkpoint(checkpoint)):
        assign(model, layer.name, layer.read().dequantize())
    return logits(model)


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    # The C++ kernel has 16-bit activations; one wrong code in a layer changes logits by far more.
    torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


@pytest.mark.sampled(3)
@WIDTHS
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_every_width_and_version(
    bits: int, sym: bool, version: str, llama: Path, quantized: Callable[..., Path]
) -> None:
    folder = quantized("llama", bits=bits, sym=sym, format=version)
    model, _ = rw.load(folder)
    assert not model.training
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, QuantLinear)
    assert (layer.bits, layer.groups, layer.zero_offset) == (bits, 3, int(version == "gptq"))
    close(logits(model), dense_logits(llama, folder, version))


@pytest.mark.parametrize("settings", [{"desc_act": True}, {"group_size": -1}, {"group_size": 16}])
def test_orders_and_group_sizes(
    settings: dict[str, Any], llama: Path, quantized: Callable[..., Path]
) -> None:
    folder = quantized("llama", **settings)
    if settings.get("desc_act"):
        g_idx = tensors_of(folder)["model.layers.0.mlp.down_proj.g_idx"]
        assert not torch.equal(g_idx, torch.arange(96) // 32)
    close(logits(rw.load(folder)[0]), dense_logits(llama, folder, "gptq"))


def test_the_two_versions_compute_the_same(quantized: Callable[..., Path]) -> None:
    v1, v2 = (quantized("llama", format=version) for version in ("gptq", "gptq_v2"))
    before, after = tensors_of(v1), tensors_of(v2)
    name = "model.layers.0.mlp.down_proj.qzeros"
    assert set(before[name].flatten().tolist()) == {0x77777777}
    assert set((after[name].long() & 0xFFFFFFFF).flatten().tolist()) == {0x88888888}
    assert torch.equal(logits(rw.load(v1)[0]), logits(rw.load(v2)[0]))


def test_without_g_idx(quantized: Callable[..., Path], tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            del tensors[name]

    folder = rewritten(quantized("llama"), tmp_path / "out", drop)
    model, _ = rw.load(folder)
    assert torch.equal(logits(model), logits(rw.load(quantized("llama"))[0]))


class TestOldAutoGPTQ:
    """Settings in quantize_config.json, none in config.json; the weight file has another name."""

    @pytest.fixture
    def old(self, quantized: Callable[..., Path], tmp_path: Path) -> Path:
        folder = rewritten(quantized("llama"), tmp_path / "old", lambda tensors: None)
        (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
        (folder / "roundwise.json").unlink()
        with edited_json(folder / "config.json") as config:
            del config["quantization_config"]
        settings = {
            "bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True,
            "true_sequential": True, "model_name_or_path": None,
            "model_file_base_name": "gptq_model-4bit-32g",
        }  # fmt: skip
        (folder / "quantize_config.json").write_text(json.dumps(settings))
        return folder

    def test_loads_and_computes_the_same(self, old: Path, quantized: Callable[..., Path]) -> None:
        before = sorted(path.name for path in old.iterdir())
        model, _ = rw.load(old)
        assert torch.equal(logits(model), logits(rw.load(quantized("llama"))[0]))
        assert sorted(path.name for path in old.iterdir()) == before

    def test_can_be_saved_in_the_current_layout(self, old: Path, tmp_path: Path) -> None:
        model, _ = rw.load(old)
        model.save_pretrained(tmp_path / "new")
        assert torch.equal(logits(rw.load(tmp_path / "new")[0]), logits(model))

    def test_without_any_settings_is_refused(self, old: Path) -> None:
        (old / "quantize_config.json").unlink()
        with pytest.raises(CheckpointError, match="it has no quantization_config"):
            rw.load(old)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_saved_and_loaded_again(
    name: str, version: str, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    model, _ = rw.load(quantized(name, format=version))
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(quantized(name, format=version)), tensors_of(tmp_path / "again")
    codes = [tensor for tensor in before if tensor.endswith((".qweight", ".qzeros", ".scales"))]
    assert codes
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in codes)
    with edited_json(tmp_path / "again" / "config.json") as config:
        assert config["quantization_config"]["quant_method"] == "gptq"
        assert config["quantization_config"]["bits"] == 4
    assert torch.equal(logits(rw.load(tmp_path / "again")[0]), logits(model))


def test_transformers_loads_the_same_model(quantized: Callable[..., Path]) -> None:
    ours, _ = rw.load(quantized("llama"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(quantized("llama")).eval()
    assert torch.equal(logits(theirs), logits(ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype, quantized: Callable[..., Path]) -> None:
    model, _ = rw.load(quantized("llama"), dtype=dtype)
    assert model.dtype == dtype
    assert model.model.layers[0].mlp.up_proj.packed().scales.dtype == torch.float16
    exact = logits(rw.load(quantized("llama"))[0])
    assert logits(model).dtype == dtype
    difference = (logits(model).float() - exact).abs().max()
    assert difference < {torch.float32: 1e-6, torch.bfloat16: 0.5, torch.float16: 0.05}[dtype]


def test_generates_with_its_cache(tiny: Path, text: Path, tmp_path: Path) -> None:
    config = rw.QuantizeConfig(recipe="textbook")
    rw.quantize(tiny, tmp_path / "out", config, str(text), samples=2, seq_len=64)
    model, tokenizer = rw.load(tmp_path / "out", dtype=torch.float32)
    inputs = tokenizer("def read_file(path):\n", return_tensors="pt")
    output = model.generate(inputs["input_ids"], max_new_tokens=8, do_sample=False)[0]
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert output.tolist() == ids[0].tolist()


def test_a_model_that_is_not_quantized(tiny: Path) -> None:
    model, tokenizer = rw.load(tiny)
    assert model.dtype == torch.bfloat16
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert tokenizer.decode(tokenizer("import os")["input_ids"]) == "import os"


class TestRefused:
    """Other formats, and incomplete files."""

    def test_another_method(self, quantized: Callable[..., Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(quantized("llama"), tmp_path / "out"))
        with edited_json(folder / "config.json") as config:
            config["quantization_config"]["quant_method"] = "awq"
        with pytest.raises(CheckpointError, match="is quantized with awq, not in the GPTQ format"):
            rw.load(folder)

    def test_a_tensor_that_is_not_there(
        self, quantized: Callable[..., Path], tmp_path: Path
    ) -> None:
        # transformers would initialize a missing norm: a model, but not this one.
        def change(tensors: dict[str, torch.Tensor]) -> None:
            del tensors["model.layers.0.input_layernorm.weight"]

        folder = rewritten(quantized("llama"), tmp_path / "out", change)
        with pytest.raises(CheckpointError, match=r"layers\.0\.input_layernorm\.weight"):
            rw.load(folder)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="there is no folder"):
            rw.load(tmp_path / "nowhere")


def test_without_a_tokenizer(llama: Path, tmp_path: Path) -> None:
    _, tokenizer = rw.load(llama)
    assert tokenizer is None
    with pytest.raises(
        CheckpointError, match=r"llama\d* has no usable tokenizer: copy the original"
    ):
        require_tokenizer(tokenizer, llama)
    folder = Path(shutil.copytree(llama, tmp_path / "damaged"))
    (folder / "tokenizer.json").write_text("{}")
    assert rw.load(folder)[1] is None


def test_a_tokenizer_is_enough(tiny: Path) -> None:
    require_tokenizer(rw.load(tiny)[1], tiny)


def test_names_of_dtypes() -> None:
    assert parse_dtype("bfloat16") is torch.bfloat16
    assert parse_dtype("auto") == "auto"
    with pytest.raises(ConfigError, match="'int8' is not supported: use auto, float32"):
        parse_dtype("int8")
