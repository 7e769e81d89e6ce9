"""Every spelling of a quantization config means the same to all readers; unknown values are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.checkpoint.gptq_format import quantization_config
from roundwise.checkpoint.quantization_config import (
    LayerConfig,
    is_packed,
    parse_quantization_config,
    quantization_method,
    read_quantization_config,
)
from roundwise.checkpoint.reader import Checkpoint
from roundwise.cli.commands.inspect import summarize
from roundwise.convert import convert
from roundwise.errors import CheckpointError
from roundwise.model.dequantized_view import dequantized_checkpoint
from roundwise.verify import audit
from tests.handmade import PLAIN, is_linear, write
from tests.helpers import raw, tensors_of
from tests.inference.checkpoints import logits


def parsed(**changes: Any) -> Any:
    return parse_quantization_config({**PLAIN, **changes}, "folder")


def without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in PLAIN.items() if key not in names}


#: Configs of one asymmetric v2 checkpoint: 4 bits, groups of 32.
V2 = {**PLAIN, "sym": False}
SPELLINGS: dict[str, dict[str, Any]] = {
    "checkpoint_format": {**V2, "checkpoint_format": "gptq_v2"},
    "format": {**V2, "format": "gptq_v2"},
    "both": {**V2, "format": "gptq_v2", "checkpoint_format": "GPTQ_V2"},
    "capitals": {**V2, "quant_method": "GPTQ", "format": "GPTQ_V2", "pack_dtype": "INT32"},
    "method": {**{k: V2[k] for k in V2 if k != "quant_method"}, "method": "gptq", "format": "gptq_v2"},
    "texts": {
        **V2, "bits": "4", "group_size": "32", "sym": "False", "desc_act": "0", "format": "gptq_v2",
    },
    "decimals": {**V2, "bits": 4.0, "group_size": 32.0, "sym": 0, "checkpoint_format": " gptq_v2 "},
    "nulls": {**V2, "checkpoint_format": None, "format": "gptq_v2", "pack_dtype": None, "dynamic": None},
    "auto-round": {
        **V2, "quant_method": "auto-round", "packing_format": "auto_round:gptqmodel",
        "data_type": "int", "act_bits": 16, "extra_config": {"lm_head": {"bits": 16}},
    },
    "how it was made": {
        **V2, "format": "gptq_v2", "damp_percent": 0, "dataset": "my own", "tokenizer": {"a": 1},
        "modules_in_block_to_quantize": [["self_attn.q_proj"]], "static_groups": "x", "batch_size": -1,
        "model_seqlen": "long", "block_name_to_quantize": 3, "damp_auto_increment": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("where", ["config.json", "quantize_config.json"])
def test_all_readers_read_the_same(spelling: str, where: str, llama: Path, tmp_path: Path) -> None:
    """The model that was written is what load, transformers, convert, verify and sources read."""
    folder = tmp_path / "checkpoint"
    expected = write(llama, folder, SPELLINGS[spelling], where=where, sym=False, v1=False)
    with torch.no_grad():
        wanted = logits(expected)
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(logits(rw.load(folder, dtype="float32")[0]), wanted, **close)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logits(theirs), wanted, **close)
    weights = {f"{name}.weight": m.weight for name, m in expected.named_modules() if "proj" in name}
    convert(folder, tmp_path / "dense", "dense", dtype=torch.float32)
    view, _ = dequantized_checkpoint(Checkpoint(folder))
    for name, W in weights.items():
        assert torch.equal(tensors_of(tmp_path / "dense")[name], W)
        assert torch.equal(view.tensors[name].read(), W)
    summary = summarize(str(folder))
    assert {layer.bits for layer in summary.layers} == {4}
    assert (summary.quantization or {})["checkpoint_format"] == "gptq_v2"
    assert audit(folder, against=Checkpoint(llama)).failures == []


@pytest.mark.parametrize("spelling", ["format", "texts", "auto-round"])
def test_what_is_converted_has_the_usual_spelling(
    spelling: str, llama: Path, tmp_path: Path
) -> None:
    write(llama, tmp_path / "v2", SPELLINGS[spelling], sym=False, v1=False)
    convert(tmp_path / "v2", tmp_path / "v1", "gptq")
    settings = json.loads((tmp_path / "v1" / "config.json").read_text())["quantization_config"]
    assert settings["checkpoint_format"] == "gptq" and "format" not in settings
    assert (settings["quant_method"], settings["bits"], settings["sym"]) == ("gptq", 4, False)
    back = convert(tmp_path / "v1", tmp_path / "again", "gptq_v2")
    before, after = tensors_of(tmp_path / "v2"), tensors_of(back)
    assert all(raw(before[name]) == raw(after[name]) for name in before)


def test_saved_by_transformers_it_is_complete(llama: Path, tmp_path: Path) -> None:
    write(llama, tmp_path / "a", SPELLINGS["texts"], sym=False, v1=False)
    model, _ = rw.load(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    settings = read_quantization_config(Checkpoint(tmp_path / "b"))
    assert settings.default == LayerConfig(4, 32, sym=False, desc_act=False)
    assert settings.checkpoint_format == "gptq_v2"
    assert torch.equal(logits(rw.load(tmp_path / "b")[0]), logits(model))


def test_the_config_of_the_text_part_counts(llama: Path, tmp_path: Path) -> None:
    write(llama, tmp_path / "a", PLAIN)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["text_config"] = {"quantization_config": config.pop("quantization_config")}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(tmp_path / "a")
    assert read_quantization_config(checkpoint).default.bits == 4
    out = convert(tmp_path / "a", tmp_path / "b", "gptq_v2")
    assert (out / "config.json").read_text().count("quantization_config") == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": 9}, "bits='9': it must be 2, 3, 4, 5, 6, 7 or 8"),
        ({"bits": "four"}, "bits='four': it must be a whole number"),
        ({"bits": 4.5}, "bits='4.5'"),
        ({"bits": True}, "bits='True'"),
        ({"bits": [4]}, "bits="),
        ({"group_size": 0}, "group_size='0': it must be -1 or"),
        ({"group_size": -2}, "group_size='-2'"),
        ({"group_size": 1e400}, "group_size='inf'"),
        ({"sym": "maybe"}, "sym='maybe': it must be true or false"),
        ({"desc_act": 2}, "desc_act='2'"),
        ({"quant_method": 4}, "quant_method='4'"),
        ({"quant_method": "awq"}, "quantized with awq, not in the GPTQ format"),
        ({"quant_method": "gptq", "method": "awq"}, "both quant_method='gptq' and method='awq'"),
        ({"format": "gptq", "checkpoint_format": "gptq_v2"}, "says both checkpoint_format"),
        ({"format": "gptq_v3"}, r"format 'gptq_v3' \(checkpoint_format\)"),
        ({"checkpoint_format": "bitblas"}, "'bitblas'"),
        ({"format": ["gptq"]}, "format="),
        ({"checkpoint_format": "marlin"}, "Marlin's layout.*use the checkpoint that it was made from"),
        ({"is_marlin_format": True}, "Marlin's layout"),
        ({"pack_dtype": "int16"}, r"words of 'int16' \(pack_dtype\)"),
        ({"pack_dtype": "torch.int64"}, "words of 'int64'"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
         r"auto-round \(auto_round:auto_awq\)"),
        ({"quant_method": "auto-round", "data_type": "mx_fp"}, "quantizes weights to 'mx_fp'"),
        ({"quant_method": "auto-round", "act_bits": 8}, "activations too"),
        ({"dynamic": [1]}, "dynamic of the quantization config is not a JSON object"),
        ({"dynamic": {"+:(": {}}}, r"pattern '\(', which is not a regular expression"),
        ({"dynamic": {"+:a": 3}}, "dynamic rule '\\+:a' .* has no settings"),
        ({"dynamic": {"+:a": {"bits": 1}}}, "bits='1'"),
        ({"quant_method": "x\x1b[31m" * 200}, "quantized with x"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as error:
        parsed(**changes)
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 400


def test_what_is_not_said_is_not_assumed() -> None:
    config = parse_quantization_config({}, "folder")
    assert config.default == LayerConfig(None, None, None, None)
    assert config.checkpoint_format == "gptq"
    assert config.as_json() == {"quant_method": "gptq", "checkpoint_format": "gptq"}


def test_layouts_of_auto_round() -> None:
    formats = {
        packing: parsed(quant_method="auto-round", packing_format=packing).checkpoint_format
        for packing in ("auto_round:auto_gptq", "auto_round", "auto_round:gptqmodel", None)
    }
    assert list(formats.values()) == ["gptq", "gptq_v2", "gptq_v2", "gptq"]
    assert quantization_method({"quant_method": "intel/auto-round"}) == "gptq"
    extra = {"a.b": {"bits": 8, "group_size": 64, "data_type": "int"}, "lm_head": {"bits": 16}}
    config = parsed(quant_method="auto-round", extra_config=extra)
    assert config.for_layer("a.b") == [LayerConfig(8, 64, sym=True, desc_act=False)]
    assert config.for_layer("lm_head") == [None]


class TestRules:
    """`dynamic`: the first pattern that matches from the start of the name wins."""

    def test_order(self) -> None:
        rules = {"-:.*gate": {}, "+:.*mlp": {"bits": 8}, "model.layers.0": {"group_size": -1}}
        config = parsed(dynamic=rules)
        assert config.for_layer("model.layers.0.mlp.gate") == [None]
        assert [s.bits for s in config.for_layer("model.layers.0.mlp.up")] == [8]
        assert [s.group_size for s in config.for_layer("model.layers.0.attn")] == [-1]
        assert config.for_layer("model.layers.1.attn")[0] == config.default

    def test_files_may_have_other_names_than_modules(self) -> None:
        config = parsed(dynamic={r"+:model\.layers\.1\.": {"bits": 8}})
        found = config.for_layer("model.language_model.layers.1.mlp.up")
        assert [settings.bits for settings in found][:2] == [8, 4]
        # Experts are w1 in the files and gate_proj in the model.
        config = parsed(dynamic={r"+:.*mlp\.experts\.0\.gate_proj": {"bits": 3}})
        found = config.for_layer("model.layers.0.block_sparse_moe.experts.0.w1")
        assert {settings.bits for settings in found} == {3, 4}

    def test_a_pattern_that_takes_for_ever_is_refused(self) -> None:
        config = parsed(dynamic={r"+:(a|aa)+$|(.*a){20}x": {"bits": 8}})
        with pytest.raises(CheckpointError, match="a pattern that takes too long on"):
            config.for_layer("a" * 3000 + "b")

    def test_rules_are_read_back_as_they_were_given(self) -> None:
        dynamic: dict[str, Any] = {"k_proj|v_proj": {"bits": 8}, r"layers\.0\.": None}
        written = quantization_config(rw.QuantizeConfig(dynamic=dynamic), true_sequential=True)
        assert parse_quantization_config(written, "folder").overrides() == dynamic
        # Other tools' patterns match from the start of the name, and change settings we do not have.
        foreign = {"+:model": {"bits": 2, "mse": 2.4}, "-:lm": {}}
        assert parsed(dynamic=foreign).overrides() == {"^(?:model)": {"bits": 2}, "^(?:lm)": None}
        assert parsed().overrides() == {}


class TestWhere:
    """The config is found where tools put it."""

    def test_a_dense_model_beside_an_old_file(self, copy_of: Callable[[str], Path]) -> None:
        folder = copy_of("llama")
        (folder / "quantize_config.json").write_text(json.dumps(PLAIN))
        assert dequantized_checkpoint(Checkpoint(folder))[1] == []
        assert rw.load(folder)[0].dtype == torch.float32
        with pytest.raises(
            CheckpointError, match="is not quantized: it has no quantization_config"
        ):
            read_quantization_config(Checkpoint(folder))

    def test_names_that_only_look_packed(self) -> None:
        assert is_packed({"a.qweight": 0}) and is_packed({"a.B": 0, "a.s": 0})
        assert not is_packed({"mixer.B": 0, "a.weight": 0, "b.s": 0})

    def test_packed_weights_without_any_config(self, llama: Path, tmp_path: Path) -> None:
        write(llama, tmp_path / "a", {}, where="nowhere.json")
        for read in (rw.load, summarize, lambda f: dequantized_checkpoint(Checkpoint(f))):
            with pytest.raises(CheckpointError, match=r"packed weights.*says how to read them"):
                read(str(tmp_path / "a"))

    def test_an_early_folder_is_a_source(self, llama: Path, tmp_path: Path) -> None:
        """Early AutoGPTQ: another file name, settings in quantize_config.json, no quant_method."""
        folder = tmp_path / "old"
        name = "gptq_model-4bit-32g.safetensors"
        model = write(
            llama, folder, without("quant_method"), where="quantize_config.json", file=name
        )
        config = rw.QuantizeConfig(bits=8, group_size=32, method="rtn")
        result = rw.quantize(folder, tmp_path / "out", config)
        assert any("quantized already, to 4 bits" in line for line in result.warnings)
        new = rw.load(tmp_path / "out", dtype="float32")[0]
        torch.testing.assert_close(logits(new), logits(model), rtol=0.2, atol=0.2)
        assert audit(tmp_path / "out", against=Checkpoint(folder)).failures == []

    def test_only_some_layers_are_packed(self, llama: Path, tmp_path: Path) -> None:
        model = write(
            llama, tmp_path / "a", {**PLAIN, "modules_in_block_to_quantize": [["mlp.down_proj"]]},
            chosen=lambda name: is_linear(name) and "down" in name,
        )  # fmt: skip
        torch.testing.assert_close(
            logits(rw.load(tmp_path / "a", dtype="float32")[0]), logits(model), rtol=1e-3, atol=1e-3
        )

    @pytest.mark.parametrize("value", [[], "gptq", 3])
    def test_a_config_that_is_no_object(self, value: Any, llama: Path, tmp_path: Path) -> None:
        write(llama, tmp_path / "a", value)
        with pytest.raises(
            CheckpointError, match=r"quantization_config in .* is not a JSON object"
        ):
            rw.load(tmp_path / "a")
