"""Quantized sources are dequantized while they are read: FP8 with a scale per block, and GPTQ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.convert import convert
from roundwise.errors import CheckpointError, ConfigError
from roundwise.model.streamed import open_streamed_model
from roundwise.plan.plan import plan
from roundwise.verify import audit
from tests.helpers import (
    ARCHITECTURES,
    LLAMA,
    contents,
    edited_json,
    random_model,
    raw,
    tensors_of,
    windows,
)
from tests.mixtures import MIXTURES

CONFIG = rw.QuantizeConfig(group_size=32, expert_tokens=1)
F8 = torch.float8_e4m3fn


def quantize(model: Path, out: Path, **changes: Any) -> rw.QuantizeResult:
    settings = {"config": CONFIG, "calibration": windows(), "samples": 4, "seq_len": 32}
    return rw.quantize(model, out, **{**settings, "batch_size": 2, **changes})


def in_fp8(W: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns W as FP8 codes and the scale of each block."""
    codes = torch.empty(W.shape, dtype=F8)
    scales = torch.empty(-(-W.shape[0] // rows), -(-W.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = W[block].abs().max() / 448
            codes[block] = (W[block] / scales[i, j]).to(F8)
    return codes, scales


def written(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pair(
    config: transformers.PretrainedConfig, folder: Path, rows: int, columns: int
) -> tuple[Path, Path]:
    """Returns a model whose linears are in FP8, and the same model with dequantized weights."""
    random_model(config).to(torch.bfloat16).save_pretrained(folder / "model")
    given = json.loads((folder / "model" / "config.json").read_text())
    fp8, dense = {}, {}
    for name, W in tensors_of(folder / "model").items():
        dense[name] = fp8[name] = W
        if name.endswith("proj.weight"):
            codes, scales = in_fp8(W.float(), rows, columns)
            fp8[name], fp8[f"{name}_scale_inv"] = codes, scales
            whole = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            whole = whole[: W.shape[0], : W.shape[1]]
            dense[name] = (codes.float() * whole).to(torch.bfloat16)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [rows, columns]}
    return (
        written(folder / "fp8", fp8, {**given, "quantization_config": settings}),
        written(folder / "dense", dense, given),
    )


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (128, 128), (40, 24)])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_fp8_gives_the_same_codes_as_its_dequantized_weights(
    name: str, rows: int, columns: int, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(**LLAMA) if name == "llama" else MIXTURES[name].config()
    fp8, dense = pair(config, tmp_path, rows, columns)
    planned = plan(open_streamed_model(fp8), CONFIG, samples=4, seq_len=32)
    result = quantize(fp8, tmp_path / "a")
    other = quantize(dense, tmp_path / "b")
    assert tensors_equal(tmp_path / "a", tmp_path / "b")
    assert result.bytes_before < other.bytes_before
    assert result.bytes_after == other.bytes_after == planned.bytes_after
    settings = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "gptq"
    for against in (fp8, dense):
        assert audit(tmp_path / "a", against=Checkpoint(against)).failures == []
    rw.load(tmp_path / "a")


def tensors_equal(one: Path, other: Path) -> bool:
    a, b = tensors_of(one), tensors_of(other)
    return set(a) == set(b) and all(raw(a[name]) == raw(b[name]) for name in a)


def test_skipped_layers_are_written_dequantized(tmp_path: Path) -> None:
    fp8, dense = pair(transformers.LlamaConfig(**LLAMA), tmp_path, 32, 32)
    config = CONFIG.model_copy(update={"dynamic": {"down_proj": None}})
    quantize(fp8, tmp_path / "out", config=config)
    name = "model.layers.0.mlp.down_proj.weight"
    assert raw(tensors_of(tmp_path / "out")[name]) == raw(tensors_of(dense)[name])
    assert not any("scale_inv" in name for name in tensors_of(tmp_path / "out"))
    assert audit(tmp_path / "out", against=Checkpoint(fp8)).failures == []


def test_fp8_can_be_rotated(tmp_path: Path) -> None:
    fp8, dense = pair(transformers.LlamaConfig(**LLAMA), tmp_path, 32, 32)
    config = CONFIG.merged({"rotate": True})
    for source, out in ((fp8, "a"), (dense, "b")):
        quantize(source, tmp_path / out, config=config)
    assert tensors_equal(tmp_path / "a", tmp_path / "b")


def test_a_finished_run_from_fp8_is_recognised(tmp_path: Path) -> None:
    fp8, _ = pair(transformers.LlamaConfig(**LLAMA), tmp_path, 32, 32)
    quantize(fp8, tmp_path / "out")
    before = contents(tmp_path / "out")
    quantize(fp8, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_incomplete_fp8_is_refused(tmp_path: Path) -> None:
    fp8, _ = pair(transformers.LlamaConfig(**LLAMA), tmp_path, 32, 32)
    with edited_json(fp8 / "config.json") as config:
        config["quantization_config"]["weight_block_size"] = [64, 64]
    with pytest.raises(CheckpointError, match=r"blocks of 64 x 64 require"):
        open_streamed_model(fp8)
    with edited_json(fp8 / "config.json") as config:
        del config["quantization_config"]["weight_block_size"]
    with pytest.raises(ConfigError, match="only FP8 with a scale per block is supported"):
        open_streamed_model(fp8)
    tensors = tensors_of(fp8)
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    (fp8 / "model.safetensors").unlink()
    save_file(tensors, fp8 / "model.safetensors", {"format": "pt"})
    with edited_json(fp8 / "config.json") as config:
        config["quantization_config"]["weight_block_size"] = [32, 32]
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale_inv is missing"):
        open_streamed_model(fp8)


@pytest.mark.parametrize("settings", [{}, {"sym": False}, {"bits": 3, "desc_act": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_gptq_is_quantized_again_from_its_dequantized_weights(
    name: str, settings: dict[str, Any], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    if name in ARCHITECTURES:
        folder = folder_of(name)
    else:
        folder = tmp_path / "model"
        random_model(MIXTURES[name].config()).save_pretrained(folder)
    quantize(folder, tmp_path / "once", config=CONFIG.merged({"method": "rtn", **settings}))
    dense = convert(tmp_path / "once", tmp_path / "dense", "dense", dtype=torch.float32)
    again = CONFIG.merged({"bits": 8, "recipe": "textbook"})
    result = quantize(tmp_path / "once", tmp_path / "twice", config=again)
    quantize(dense, tmp_path / "expected", config=again)
    assert tensors_equal(tmp_path / "twice", tmp_path / "expected")
    assert any("quantized already, to" in warning for warning in result.warnings)
    assert audit(tmp_path / "twice", against=Checkpoint(tmp_path / "once")).failures == []
    assert not any(
        "quantized already" in w for w in plan(open_streamed_model(dense), again).warnings
    )
    assert any(
        "quantized already" in w
        for w in plan(open_streamed_model(tmp_path / "once"), again).warnings
    )


def test_other_formats_are_refused_by_name(llama: Path, copy_of: Any) -> None:
    folder = copy_of("llama")
    with edited_json(folder / "config.json") as config:
        config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    with pytest.raises(ConfigError, match=r"is quantized already \(awq\)"):
        open_streamed_model(folder)
