"""Every tensor of the model has its name and value in the files, as transformers itself loads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import modeling_layers

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.transformed_view import ComputedInfo
from roundwise.checkpoint.writer import write_safetensors
from roundwise.convert import convert
from roundwise.errors import CheckpointError
from roundwise.model.build import build, load_config
from roundwise.model.conversions import converted_checkpoint, dense_layers, map_tensor_names
from roundwise.model.streamed import open_streamed_model
from roundwise.verify import audit
from tests.helpers import ARCHITECTURES, LLAMA, random_model, raw, tensors_of, windows
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


def test_layers_with_a_dense_matrix(folder_of: Callable[[str], Path]) -> None:
    streamed = open_streamed_model(folder_of("mixtral"))
    quantized = {name for block in streamed.blocks for name in block.linears}
    stored = {
        streamed.checkpoint_name_of[f"{name}.weight"][: -len(".weight")] for name in quantized
    }
    names = dense_layers(streamed.model, streamed.checkpoint.tensors, quantized | stored)
    routers = [
        f"model.layers.{i}.{name}.gate" for i in (0, 1) for name in ("mlp", "block_sparse_moe")
    ]
    assert sorted(names) == sorted(["lm_head", *routers])
    assert "lm_head" not in dense_layers(streamed.model, {}, {"lm_head"})


class TestLayersThatOnlyTheFilesHave:
    """Draft layers (MTP) and the like are kept as they are, and the config says that they are dense."""

    #: Family -> (tensors added to its files, their modules, names that engines look up).
    CASES: ClassVar[dict[str, tuple[str, list[str], list[str]]]] = {
        # DeepSeek, GLM: one more layer than the config counts.
        "deepseek_v3": (
            "model.layers.2.", ["model.layers.2"],
            ["model.layers.2.mtp_block.self_attn.o_proj", "model.layers.2.eh_proj"],
        ),
        # Qwen3-Next and others: a module of its own.
        "qwen3": ("mtp.layers.0.", ["mtp"], ["mtp.layers.0.self_attn.q_proj", "model.mtp.fc"]),
        # Files without the prefix of the base model.
        "llama": ("draft_head.0.", ["draft_head"], ["draft_head.0.mlp.up_proj"]),
    }  # fmt: skip

    @pytest.mark.parametrize("file_format", ["gptq", "compressed-tensors"])
    @pytest.mark.parametrize("name", CASES)
    def test_they_are_declared(
        self, name: str, file_format: Any, copy_of: Callable[[str], Path], tmp_path: Path
    ) -> None:
        prefix, modules, engine_names = self.CASES[name]
        model = copy_of(name)
        tensors = load_file(model / "model.safetensors")
        for key in [key for key in tensors if key.startswith("model.layers.1.")]:
            tensors[prefix + key.removeprefix("model.layers.1.")] = tensors[key].clone()
        tensors[f"{prefix}eh_proj.weight"] = torch.randn(64, 128)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        streamed = open_streamed_model(model)
        assert streamed.ignored_modules() == modules
        config = rw.QuantizeConfig(method="rtn", group_size=32, format=file_format)
        result = rw.quantize(model, tmp_path / "out", config)
        assert any(line.startswith(f"{modules[0]} stay dense") for line in result.warnings)
        assert not audit(tmp_path / "out", against=Checkpoint(model)).failures
        rw.load(tmp_path / "out")
        other = "compressed-tensors" if file_format == "gptq" else "gptq"
        convert(tmp_path / "out", tmp_path / "other", other)
        rw.load(tmp_path / "other")
        drafts = [key for key in tensors if key.startswith(prefix)]
        linears = [n for block in streamed.blocks for n in block.linears]
        for folder in (tmp_path / "out", tmp_path / "other"):
            stored = tensors_of(folder)
            assert all(raw(stored[key]) == raw(tensors[key]) for key in drafts)
            dense = [*engine_names, *(key.removesuffix(".weight") for key in drafts)]
            assert all(self.is_skipped(folder, key) for key in dense)
            assert not any(self.is_skipped(folder, key) for key in linears)

    def is_skipped(self, folder: Path, layer: str) -> bool:
        """As vLLM decides: patterns match from the start of a name."""
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        if "ignore" in settings:
            patterns = [
                x[3:] if x.startswith("re:") else re.escape(x) + "$" for x in settings["ignore"]
            ]
        else:
            patterns = [x[2:] for x in settings.get("dynamic", {}) if x.startswith("-:")]
        return any(re.match(pattern, layer) for pattern in patterns)

    def test_a_rotation_leaves_them_behind(
        self, copy_of: Callable[[str], Path], tmp_path: Path
    ) -> None:
        model = copy_of("llama")
        tensors = load_file(model / "model.safetensors")
        tensors["mtp.fc.weight"] = torch.randn(64, 128)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        config = rw.QuantizeConfig(method="rtn", group_size=32, rotate=True)
        result = rw.quantize(model, tmp_path / "out", config)
        assert any("mtp is not rotated" in line for line in result.not_as_asked)

    @pytest.mark.parametrize("file_format", ["gptq", "compressed-tensors"])
    def test_transformers_runs_them_beside_the_quantized_model(
        self,
        file_format: Any,
        copy_of: Callable[[str], Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        mtp_model = getattr(modeling_layers, "MtpModel", None)
        if mtp_model is None:
            pytest.skip(f"transformers {transformers.__version__} runs no draft layers")
        # Where transformers looks for the draft layers: this model has 2 layers, not 61.
        monkeypatch.setattr(
            transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected",
            [r"model\.layers\.2\..*"],
        )  # fmt: skip
        model, prefix = copy_of("deepseek_v3"), "model.layers.2."
        tensors = load_file(model / "model.safetensors")
        for key in [key for key in tensors if key.startswith("model.layers.1.")]:
            tensors[prefix + key.removeprefix("model.layers.1.")] = tensors[key].clone()
        tensors[f"{prefix}eh_proj.weight"] = torch.randn(64, 128)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{prefix}{norm}.weight"] = torch.rand(64)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        config = rw.QuantizeConfig(method="rtn", group_size=32, format=file_format)
        rw.quantize(model, tmp_path / "out", config)
        ids = torch.tensor(windows(1, 12))
        drafts, answers = [], []
        for folder in (model, tmp_path / "out"):
            loaded = rw.load(folder, dtype=torch.float32)[0]
            drafts.append(mtp_model.from_pretrained(loaded).layers.state_dict())
            answers += [
                loaded.generate(ids, max_new_tokens=8, do_sample=False, use_mtp=use_mtp)
                for use_mtp in (False, True)
            ]
        assert drafts[0].keys() == drafts[1].keys() and "0.eh_proj.weight" in drafts[0]
        assert all(torch.equal(drafts[0][key], drafts[1][key]) for key in drafts[0])
        assert torch.equal(drafts[1]["0.eh_proj.weight"], tensors[f"{prefix}eh_proj.weight"])
        # Drafts change the time, not the answer; the quantized model has one of its own.
        assert torch.equal(answers[0], answers[1]) and torch.equal(answers[2], answers[3])
        assert not torch.equal(answers[0], answers[2])
