"""`roundwise.load` opens every GPTQ checkpoint: widths, versions, orders, ages; and refuses others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import roundwise as rw
from roundwise.checkpoint.gptq_format import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import CheckpointError
from roundwise.inference.quant_linear import QuantLinear
from tests.helpers import assign, edited_json, tensors_of, windows

WIDTHS = pytest.mark.parametrize("bits", [2, 3, 4, 8])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.tensor(windows(seed=9))).logits


def dense_logits(source: Path, checkpoint: Path, version: str) -> torch.Tensor:
    """Of the source model with the dequantized weights of the checkpoint in place of its own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    for layer in quantized_layers(Checkpoint(checkpoint)):
        assign(model, layer.name, layer.read(version).dequantize())
    return logits(model)


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    # The native kernel's 16-bit activations; one wrong code in a layer moves logits by far more.
    torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


def rewritten(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint as one file, its tensors changed."""
    shutil.copytree(source, out)
    tensors = tensors_of(out)
    for file in [*out.glob("*.safetensors"), out / "model.safetensors.index.json"]:
        file.unlink()
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


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
    """quantize_config.json beside a config.json that says nothing, weights under their own name."""

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

    def test_can_be_saved_in_todays_layout(self, old: Path, tmp_path: Path) -> None:
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


def test_importing_roundwise_lets_transformers_load_it(quantized: Callable[..., Path]) -> None:
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


def test_groups_that_nobody_can_know(quantized: Callable[..., Path], tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.down_proj"
        del tensors[f"{name}.g_idx"]
        for part in ("scales", "qzeros"):
            tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"].repeat(3, 1)[:5].contiguous()

    folder = rewritten(quantized("llama"), tmp_path / "out", cut)
    with pytest.raises(CheckpointError, match="has 96 input channels in 5 groups, and no g_idx"):
        rw.load(folder)


class TestRefused:
    """Files that contradict themselves."""

    NAME = "model.layers.0.mlp.down_proj"

    def test_another_method(self, quantized: Callable[..., Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(quantized("llama"), tmp_path / "out"))
        with edited_json(folder / "config.json") as config:
            config["quantization_config"]["quant_method"] = "awq"
        with pytest.raises(CheckpointError, match="is quantized with awq, not in the GPTQ format"):
            rw.load(folder)

    @pytest.mark.parametrize(
        ("suffix", "shape", "says"),
        [
            ("qweight", (8, 64), "does not fit a layer of 96 to 64 channels"),
            ("qweight", (12, 32), "do not fit together"),
            ("qweight", (12,), "must be matrices"),
            ("qzeros", (3, 7), "do not fit together"),
            ("qzeros", (2, 8), "do not fit together"),
            ("scales", (3, 32), "do not fit together"),
            ("scales", (0, 64), "must be matrices"),
            ("g_idx", (95,), "g_idx"),
            ("qzeros", None, "qzeros or scales are missing"),
            ("scales", None, "qzeros or scales are missing"),
        ],
    )
    def test_wrong_shapes(
        self,
        suffix: str,
        shape: tuple[int, ...] | None,
        says: str,
        quantized: Callable[..., Path],
        tmp_path: Path,
    ) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            old = tensors.pop(f"{self.NAME}.{suffix}")
            if shape is not None:
                tensors[f"{self.NAME}.{suffix}"] = torch.zeros(shape, dtype=old.dtype)

        folder = rewritten(quantized("llama"), tmp_path / "out", change)
        with pytest.raises(CheckpointError, match=says):
            rw.load(folder)

    @pytest.mark.parametrize("value", [3, -1])
    def test_a_g_idx_that_names_no_group(
        self, value: int, quantized: Callable[..., Path], tmp_path: Path
    ) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[f"{self.NAME}.g_idx"][5] = value

        folder = rewritten(quantized("llama"), tmp_path / "out", change)
        with pytest.raises(CheckpointError, match="g_idx"):
            rw.load(folder)

    def test_a_layer_that_the_model_does_not_have(
        self, quantized: Callable[..., Path], tmp_path: Path
    ) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            for suffix in ("qweight", "qzeros", "scales", "g_idx"):
                tensors[f"model.layers.9.mlp.down_proj.{suffix}"] = tensors[
                    f"{self.NAME}.{suffix}"
                ].clone()

        folder = rewritten(quantized("llama"), tmp_path / "out", change)
        with pytest.raises(CheckpointError, match=r"layers\.9\.mlp\.down_proj.*no such layer"):
            rw.load(folder)

    def test_a_tensor_that_is_not_there(
        self, quantized: Callable[..., Path], tmp_path: Path
    ) -> None:
        # A norm that is missing would be made up by transformers: a model, but not this one.
        def change(tensors: dict[str, torch.Tensor]) -> None:
            del tensors["model.layers.0.input_layernorm.weight"]

        folder = rewritten(quantized("llama"), tmp_path / "out", change)
        with pytest.raises(CheckpointError, match=r"layers\.0\.input_layernorm\.weight"):
            rw.load(folder)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="there is no folder"):
            rw.load(tmp_path / "nowhere")


def test_the_file_is_read_not_trusted(quantized: Callable[..., Path], tmp_path: Path) -> None:
    # A config that names another width than the tensors have: the tensors count.
    folder = Path(shutil.copytree(quantized("llama", bits=8), tmp_path / "out"))
    with edited_json(folder / "config.json") as config:
        config["quantization_config"]["bits"] = 4
    expected = logits(rw.load(quantized("llama", bits=8))[0])
    assert torch.equal(logits(rw.load(folder)[0]), expected)
    assert load_file(next(folder.glob("*-00001-*")))
