"""Tensors that contradict the config or each other are refused by every reader, with one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import roundwise as rw
from roundwise.checkpoint.quantization_config import parse_quantization_config
from roundwise.checkpoint.quantized_layers import QuantizedLayer, find_layers, quantized_layers
from roundwise.checkpoint.reader import Checkpoint, read_header
from roundwise.cli.commands.inspect import summarize
from roundwise.convert import convert
from roundwise.errors import CheckpointError, RoundwiseError
from roundwise.model.dequantized_view import dequantized_checkpoint
from roundwise.model.streamed import open_streamed_model
from roundwise.verify import audit
from tests.handmade import PLAIN, Change, packed, write
from tests.helpers import edited_json, random_model, tensors_of
from tests.inference.checkpoints import LAYER, logits


def _verify(folder: Path) -> None:
    audit(folder).raise_on_failure()


def _source(folder: Path) -> None:
    view, _ = dequantized_checkpoint(Checkpoint(folder))
    streamed = open_streamed_model(view)
    for block in streamed.blocks:
        streamed.load(block.module, block.name)


#: All that reads packed codes.
READERS: dict[str, Callable[[Path], Any]] = {
    "load": rw.load,
    "transformers": transformers.AutoModelForCausalLM.from_pretrained,
    "convert": lambda folder: convert(folder, folder / "dense", "dense"),
    "convert to gptq": lambda folder: convert(folder, folder / "gptq", "gptq"),
    "verify": _verify,
    "inspect": lambda folder: summarize(str(folder)),
    "source": _source,
}


@pytest.fixture
def good(llama: Path, tmp_path: Path) -> Path:
    """A checkpoint in which nothing is wrong."""
    write(llama, tmp_path / "good", PLAIN)
    return tmp_path / "good"


@pytest.mark.parametrize("reader", READERS)
def test_a_good_one_is_read(reader: str, good: Path) -> None:
    READERS[reader](good)


def to(suffix: str, dtype: torch.dtype) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.{suffix}"] = tensors[f"{LAYER}.{suffix}"].to(dtype)

    return change


def resized(suffix: str, *shape: int) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        old = tensors[f"{LAYER}.{suffix}"]
        tensors[f"{LAYER}.{suffix}"] = torch.zeros(shape, dtype=old.dtype)

    return change


def filled(suffix: str, value: float) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.{suffix}"][1, 2] = value

    return change


def regrouped(change_g_idx: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.g_idx"] = change_g_idx(tensors[f"{LAYER}.g_idx"]).to(torch.int32)

    return change


def dropped(suffix: str) -> Change:
    return lambda tensors: [tensors.pop(f"{LAYER}.{suffix}"), None][1]


def with_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight"] = torch.zeros(64, 96)


def in_marlins_layout(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(".qweight")]:
        stem = name.removesuffix(".qweight")
        tensors[f"{stem}.B"] = tensors.pop(name).reshape(-1, 128)
        tensors[f"{stem}.s"] = tensors.pop(f"{stem}.scales")
        tensors[f"{stem}.workspace"] = torch.zeros(16, dtype=torch.int32)
        del tensors[f"{stem}.qzeros"], tensors[f"{stem}.g_idx"]


#: Name -> (changed config, changed tensors, what the sentence says).
WRONG: dict[str, tuple[dict[str, Any], Change, str]] = {
    "codes of 64 bits": ({}, to("qweight", torch.int64), "qweight is I64, but must be I32"),
    "codes of 16 bits": ({}, to("qweight", torch.int16), "qweight is I16"),
    "codes as floats": ({}, to("qweight", torch.float32), "qweight is F32"),
    "zero points as floats": ({}, to("qzeros", torch.float16), "qzeros is F16"),
    "zero points of 64 bits": ({}, to("qzeros", torch.int64), "qzeros is I64"),
    "whole scales": ({}, to("scales", torch.int32), "scales is I32, but must be F16 or BF16 or F32"),
    "scales of 64 bits": ({}, to("scales", torch.float64), "scales is F64"),
    "g_idx as floats": ({}, to("g_idx", torch.float32), "g_idx is F32"),
    "too few codes": ({}, resized("qweight", 8, 64), "g_idx has shape"),
    "codes of fewer outputs": ({}, resized("qweight", 12, 32), "do not fit together"),
    "a row of codes": ({}, resized("qweight", 12), "must be matrices"),
    "too few zero points": ({}, resized("qzeros", 3, 7), "do not fit together"),
    "zero points of fewer groups": ({}, resized("qzeros", 2, 8), "do not fit together"),
    "scales of fewer outputs": ({}, resized("scales", 3, 32), "do not fit together"),
    "no scales": ({}, resized("scales", 0, 64), "must be matrices"),
    "a short g_idx": ({}, resized("g_idx", 95), "g_idx has shape"),
    "a long bias": ({}, lambda t: t.update({f"{LAYER}.bias": torch.zeros(65)}), "bias has shape"),
    "qzeros are missing": ({}, dropped("qzeros"), "lacks qzeros"),
    "scales are missing": ({}, dropped("scales"), "lacks scales"),
    "a weight too": ({}, with_weight, "has both packed codes and a weight"),
    "a scale of zero": ({}, filled("scales", 0.0), "a scale that is zero or not finite"),
    "a scale of nan": ({}, filled("scales", float("nan")), "a scale that is zero or not finite"),
    "an infinite scale": ({}, filled("scales", float("-inf")), "a scale that is zero or not finite"),
    "a zero point beside the middle": (
        {}, filled("qzeros", 0x77777776), "zero points other than 8, .* set sym to false",
    ),
    "v1 as v2": ({"checkpoint_format": "gptq_v2"}, lambda t: None, "set checkpoint_format to gptq "),
    "a group that is not there": ({}, regrouped(lambda g: g + 1), "groups 1 … 3, but the layer has 3"),
    "a negative group": ({}, regrouped(lambda g: g - 1), "groups -1 … 1, but"),
    "a group twice": ({}, regrouped(lambda g: g * 0), "96 channels into a group of 32"),
    "act-order": ({}, regrouped(lambda g: g.flip(0)), "but the config says desc_act is off"),
    "other bits": ({"bits": 8}, lambda t: None, "codes of 4 bits, but the config says bits=8"),
    "smaller groups": ({"group_size": 16}, lambda t: None, "3 groups of its 96 .* says group_size=16"),
    "larger groups": ({"group_size": 64}, lambda t: None, "says group_size=64"),
    "one group": ({"group_size": -1}, lambda t: None, "says group_size=-1"),
    "a rule with other bits": (
        {"dynamic": {"+:.*down_proj": {"bits": 2}}}, lambda t: None, "config says bits=2",
    ),
    "a rule for no quantization": (
        {"dynamic": {r"-:model\.layers\.0\.mlp": {}}}, lambda t: None, "says that it is not quantized",
    ),
    "Marlin's layout": ({}, in_marlins_layout, "Marlin's layout"),
    "Marlin's layout, with its config": (
        {"checkpoint_format": "marlin", "is_marlin_format": True}, in_marlins_layout, "Marlin's layout",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_every_reader_refuses(case: str, llama: Path, tmp_path: Path) -> None:
    changes, change, says = WRONG[case]
    for reader, read in READERS.items():
        folder = tmp_path / reader
        if not (tmp_path / "made").exists():
            write(llama, tmp_path / "made", {**PLAIN, **changes}, change=change)
        shutil.copytree(tmp_path / "made", folder)
        with pytest.raises(RoundwiseError, match=says) as error:
            read(folder)
        assert "\n" not in str(error.value), reader


@pytest.mark.parametrize(
    "claim", [{"bits": 2}, {"group_size": 64}, {"checkpoint_format": "gptq_v2"}, {"desc_act": True}]
)
def test_a_copy_with_another_config_is_not_verified(
    claim: dict[str, Any], quantized: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(quantized("llama"), tmp_path / "copy"))
    (folder / "roundwise.json").unlink()
    with edited_json(folder / "config.json") as config:
        config["quantization_config"].update(claim)
    # Act-order files may have groups in order.
    assert bool(audit(folder).failures) == (claim != {"desc_act": True})


class TestGroups:
    """Which channels share a scale, with and without g_idx."""

    @pytest.fixture
    def uneven(self, tmp_path: Path) -> Path:
        """A model of 192 input channels."""
        config = transformers.LlamaConfig(
            vocab_size=128, hidden_size=192, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
        )  # fmt: skip
        random_model(config).save_pretrained(tmp_path / "uneven")
        return tmp_path / "uneven"

    @pytest.mark.parametrize("g_idx", [True, False])
    @pytest.mark.parametrize("group", [128, 160, 48, -1, 512])
    def test_the_last_group_may_be_smaller(
        self, group: int, g_idx: bool, uneven: Path, tmp_path: Path
    ) -> None:
        # 192 channels in groups of 128 are 128 + 64, not 96 + 96.
        folder = tmp_path / "out"
        config = {**PLAIN, "group_size": group}
        model = write(uneven, folder, config, group=min(group, 192), g_idx=g_idx)
        loaded, _ = rw.load(folder, dtype="float32")
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)
        dense = tensors_of(convert(folder, tmp_path / "dense", "dense", dtype=torch.float32))
        W = model.model.layers[1].mlp.down_proj.weight
        assert torch.equal(dense["model.layers.1.mlp.down_proj.weight"], W)
        loaded.save_pretrained(tmp_path / "saved")
        again, _ = rw.load(tmp_path / "saved", dtype="float32")
        assert torch.equal(logits(again), logits(loaded))
        assert {layer.group_size for layer in quantized_layers(Checkpoint(folder))} == {
            192 if group in (-1, 512) else group
        }

    def test_on_disk_too(self, uneven: Path, tmp_path: Path) -> None:
        places = (
            "model.embed_tokens",
            "model.layers.0",
            "model.norm",
            "model.rotary_emb",
            "lm_head",
        )
        model = write(
            uneven, tmp_path / "out", {**PLAIN, "group_size": 128}, group=128, g_idx=False
        )
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", offload_folder=tmp_path, offload_buffers=True, dtype="float32",
            device_map={**dict.fromkeys(places, "cpu"), "model.layers.1": "disk"},
        )  # fmt: skip
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)

    def test_neither_g_idx_nor_group_size(self, uneven: Path, tmp_path: Path) -> None:
        config = {key: value for key, value in PLAIN.items() if key != "group_size"}
        write(uneven, tmp_path / "out", config, group=128, g_idx=False)
        with pytest.raises(
            CheckpointError, match=r"2 groups and no g_idx, .* no group_size: add it"
        ):
            rw.load(tmp_path / "out")
        model = write(uneven, tmp_path / "with", config, group=128)
        loaded, _ = rw.load(tmp_path / "with", dtype="float32")
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_act_order(self, dtype: torch.dtype, uneven: Path, tmp_path: Path) -> None:
        groups_of = np.random.default_rng(1).permutation(192) // 64

        def change(tensors: dict[str, torch.Tensor]) -> None:
            for name in [name for name in tensors if name.endswith("g_idx")]:
                tensors[name] = tensors[name].to(dtype)

        config = {**PLAIN, "group_size": 64, "desc_act": True}
        model = write(uneven, tmp_path / "out", config, change=change, groups_of=groups_of)
        loaded, _ = rw.load(tmp_path / "out", dtype="float32")
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)


def test_layers_with_other_settings_than_the_default(llama: Path, tmp_path: Path) -> None:
    wide, W = packed(torch.randn(64, 96), bits=8, group=-1)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({f"{LAYER}.{suffix}": tensor for suffix, tensor in wide.items()})

    dynamic = {r"+:.*layers\.0.*down_proj": {"bits": "8", "group_size": "-1"}}
    write(llama, tmp_path / "a", {**PLAIN, "dynamic": dynamic}, change=change)
    layers = {layer.name: layer for layer in quantized_layers(Checkpoint(tmp_path / "a"))}
    assert (layers[LAYER].bits, layers[LAYER].groups, layers[LAYER].group_size) == (8, 1, 96)
    assert torch.equal(layers[LAYER].read().dequantize(), W)
    assert (layers["model.layers.1.mlp.down_proj"].bits, len(layers)) == (4, 14)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize("sym", [True, False])
def test_a_layer_reads_what_was_packed_by_hand(
    bits: int, v1: bool, sym: bool, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    tensors, W = packed(torch.randn(64, 96), bits=bits, sym=sym, v1=v1)
    save_file({f"a.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "x.safetensors")
    settings = {**PLAIN, "bits": bits, "sym": sym, "format": "gptq" if v1 else "gptq_v2"}
    config = parse_quantization_config(settings, "folder")
    (layer,) = find_layers(read_header(tmp_path / "x.safetensors"), config)
    assert isinstance(layer, QuantizedLayer)
    assert (layer.bits, layer.in_features, layer.out_features, layer.groups) == (bits, 96, 64, 3)
    assert torch.equal(layer.read().dequantize(), W)
