"""Quantized sources are dequantized while they are read, in the formats of published models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.convert import convert
from roundwise.errors import CheckpointError, RoundwiseError
from roundwise.model.dequantized_view import dequantized_checkpoint
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
from tests.matrix.tiny import tiny_model
from tests.mixtures import MIXTURES
from tests.published import F8, FORMATS, fp4_of_deepseek, fp8, pairs, publish, write_model

CONFIG = rw.QuantizeConfig(group_size=32, expert_tokens=1)
QUICK = CONFIG.merged({"recipe": "textbook"})


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


@pytest.mark.sampled(3)
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
    fp8, dense = pair(transformers.LlamaConfig(**LLAMA), tmp_path, 32, 32)
    with edited_json(fp8 / "config.json") as config:
        config["quantization_config"]["weight_block_size"] = [64, 64]
    with pytest.raises(CheckpointError, match=r"blocks of 64 x 64 require"):
        open_streamed_model(fp8)
    with edited_json(fp8 / "config.json") as config:
        config["quantization_config"]["weight_block_size"] = [64, "64"]
    with pytest.raises(
        CheckpointError, match=r"weight_block_size in .* is not two numbers above 0"
    ):
        open_streamed_model(fp8)
    with edited_json(fp8 / "config.json") as config:
        del config["quantization_config"]["weight_block_size"]
    name = "model.layers.0.mlp.up_proj.weight"  # blocks that divide a weight are clear without it
    read = open_streamed_model(fp8).checkpoint.tensors[name].read()
    assert raw(read) == raw(tensors_of(dense)[name])
    tensors = tensors_of(fp8)
    del tensors[f"{name}_scale_inv"]
    rewrite(fp8, tensors)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale_inv is missing"):
        open_streamed_model(fp8)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_is_what_the_package_of_its_format_makes_of_it(
    name: str, llama: Path, tmp_path: Path
) -> None:
    published, dense = publish(llama, tmp_path, FORMATS[name])
    view, _ = dequantized_checkpoint(Checkpoint(published))
    expected = tensors_of(dense)
    assert view.tensors.keys() == expected.keys()
    for key, W in expected.items():
        info = view.tensors[key]
        assert (info.dtype, info.shape, info.nbytes) == ("BF16", tuple(W.shape), 2 * W.numel())
        assert raw(info.read()) == raw(W), key
        assert raw(info.rows(3, 5).read()) == raw(W[3:8]), key
    assert not {"quantization_config", "expert_dtype"} & {*view.config}


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("llama", name) for name in FORMATS),
        *(
            ("deepseek_v3", n)
            for n in ("deepseek-v4", "compressed-int4", "compressed-nvfp4", "awq")
        ),
    ],
)
def test_a_published_model_gives_the_same_codes_as_its_dequantized_weights(
    model: str, name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    published, dense = publish(folder_of(model), tmp_path, FORMATS[name])
    planned = plan(open_streamed_model(published), CONFIG, samples=4, seq_len=32)
    kind = "experts" if model == "deepseek_v3" else "layers"
    line = f"{FORMATS[name].name} {kind} -> 4-bit GPTQ ("
    assert any(source.startswith(line) for source in planned.sources)
    assert plan(open_streamed_model(dense), CONFIG, samples=4, seq_len=32).sources == []
    result = quantize(published, tmp_path / "a", config=QUICK)
    quantize(dense, tmp_path / "b", config=QUICK)
    assert tensors_equal(tmp_path / "a", tmp_path / "b")
    assert result.bytes_after == planned.bytes_after
    for against in (published, dense):
        assert audit(tmp_path / "a", against=Checkpoint(against)).failures == []
    again = any("quantized already, to" in warning for warning in result.warnings)
    assert again == (name in ("awq", "compressed-int4"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_the_bundled_model_loses_no_more_from_a_published_format(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    """The same bytes as from the dequantized weights, and so the same KL divergence."""
    published, dense = publish(tiny, tmp_path, FORMATS[name])
    for source, out in ((published, "a"), (dense, "b")):
        rw.quantize(source, tmp_path / out, calibration="python-stdlib", samples=8, seq_len=128)
    assert tensors_equal(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("square", [False, True])
def test_experts_of_gpt_oss(square: bool, tmp_path: Path) -> None:
    """MXFP4, [experts, out, blocks, 16]; the model has them transposed, which a square hides."""
    config = MIXTURES["gpt_oss"].config()
    config.intermediate_size = config.hidden_size if square else config.intermediate_size
    random_model(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    given = json.loads((tmp_path / "model" / "config.json").read_text())
    stored, dense = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    for name, W in dense.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = stored.pop(name).shape
            codes = torch.randint(16, (experts, rows, columns), generator=generator).to(torch.uint8)
            scales = torch.randint(118, 123, (experts, rows, columns // 32), generator=generator)
            stored[f"{name}_blocks"] = pairs(codes).unflatten(2, (-1, 16))
            stored[f"{name}_scales"] = scales.to(torch.uint8)
            dense[name] = convert_moe_packed_tensors(
                stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=W.dtype
            )
            assert dense[name].shape == W.shape
    method = {
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    }
    published = write_model(tmp_path / "model", tmp_path / "p", stored, {**given, **method})
    twin = write_model(tmp_path / "model", tmp_path / "d", dense, given)
    view, _ = dequantized_checkpoint(Checkpoint(published))
    for name, W in dense.items():
        assert raw(view.tensors[name].read()) == raw(W), name
        if name.endswith("proj"):
            assert raw(view.tensors[name].rows(2, 1).read()) == raw(W[2:3]), name
    planned = plan(open_streamed_model(published), CONFIG, samples=4, seq_len=32)
    assert planned.sources == ["MXFP4 experts -> 4-bit GPTQ (24)"]
    quantize(published, tmp_path / "a", config=QUICK)
    quantize(twin, tmp_path / "b", config=QUICK)
    assert tensors_equal(tmp_path / "a", tmp_path / "b")
    assert audit(tmp_path / "a", against=Checkpoint(published)).failures == []


def test_deepseek_v4_under_its_own_names(tmp_path: Path) -> None:
    """FP4 experts, FP8 elsewhere, scales called `scale`; other parameters are called so too."""
    tiny_model("DeepseekV4ForCausalLM").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"dtype": "bfloat16"}
    stored, dense = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, W in tensors_of(tmp_path / "model").items():
        stored[name] = dense[name] = W.to(torch.bfloat16) if W.is_floating_point() else W
        inside = name.endswith(".weight") and ".layers." in f".{name}"
        if inside and W.ndim == 2 and not any(size % 32 for size in W.shape):
            stem = name.removesuffix(".weight")
            write = fp4_of_deepseek if ".experts." in name else fp8([32, 32], "ue8m0", "scale")
            del stored[name]
            made, dense[name] = write(stem, W.to(torch.bfloat16))
            stored |= made
    assert any(".experts." in name and T.dtype == torch.int8 for name, T in stored.items())
    assert any(name.endswith("attn.wq_a.scale") for name in stored)
    method = {"quantization_config": FORMATS["deepseek-v4"].settings, "expert_dtype": "fp4"}
    published = write_model(tmp_path / "model", tmp_path / "p", stored, {**config, **method})
    twin = write_model(tmp_path / "model", tmp_path / "d", dense, config)
    planned = plan(open_streamed_model(published), CONFIG, samples=4, seq_len=32)
    assert planned.sources[0].startswith("MXFP4 experts -> 4-bit GPTQ (")
    assert any(line.startswith("FP8 layers -> 4-bit GPTQ (") for line in planned.sources)
    quantize(published, tmp_path / "a", config=QUICK)
    quantize(twin, tmp_path / "b", config=QUICK)
    assert tensors_equal(tmp_path / "a", tmp_path / "b")
    assert "expert_dtype" not in json.loads((tmp_path / "a" / "config.json").read_text())


def test_a_mixed_checkpoint(llama: Path, tmp_path: Path) -> None:
    """FP8 and packed integers in one checkpoint of compressed-tensors, as Kimi has them."""
    integers, floats = FORMATS["compressed-int4"], FORMATS["compressed-fp8-channel"]
    one, dense = publish(llama, tmp_path / "one", integers)
    other, other_dense = publish(llama, tmp_path / "other", floats)
    kept = tensors_of(one), tensors_of(other)
    mixed = {n: T for n, T in kept[0].items() if ".mlp." in n} | {
        n: T for n, T in kept[1].items() if ".mlp." not in n
    }
    group = {**integers.settings["config_groups"]["group_0"], "targets": [r"re:.*\.mlp\..*"]}
    groups = {"a": floats.settings["config_groups"]["group_0"], "b": group}
    settings = {**integers.settings, "format": "mixed-precision", "config_groups": groups}
    config = json.loads((dense / "config.json").read_text())
    folder = write_model(
        one, tmp_path / "mixed", mixed, {**config, "quantization_config": settings}
    )
    view, warnings = dequantized_checkpoint(Checkpoint(folder))
    expected = tensors_of(other_dense)
    expected |= {name: T for name, T in tensors_of(dense).items() if ".mlp." in name}
    assert view.tensors.keys() == expected.keys()
    assert all(raw(view.tensors[name].read()) == raw(T) for name, T in expected.items())
    assert len(warnings) == 1 and "to 4 bits" in warnings[0]
    skip = CONFIG.model_copy(update={"dynamic": {"down_proj": None}})
    assert plan(open_streamed_model(folder), skip, samples=4, seq_len=32).sources == [
        "FP8 layers -> 4-bit GPTQ (8)", "INT4 layers -> 4-bit GPTQ (4)",
        "INT4 layers -> BF16, not quantized (2)",
    ]  # fmt: skip


def test_settings_of_modelopt_in_a_file_of_their_own(llama: Path, tmp_path: Path) -> None:
    published, dense = publish(llama, tmp_path, FORMATS["modelopt-nvfp4"])
    with edited_json(published / "config.json") as config:
        settings = config.pop("quantization_config")
    with pytest.raises(CheckpointError, match="has quantized weights with scales: it has no quant"):
        open_streamed_model(published)
    file = published / "hf_quant_config.json"
    file.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": settings}))
    quantize(published, tmp_path / "a", config=QUICK)
    quantize(dense, tmp_path / "b", config=QUICK)
    assert tensors_equal(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "a" / file.name).exists()  # it is not true of the result


@pytest.mark.sampled(4)
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


REFUSED = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        r"\(bitsandbytes\): start from the original, or write its weights dense with transformers",
    ),
    "hqq": ({"quant_method": "hqq"}, r"quantized already \(hqq\): start from the original$"),
    "modelopt-awq": (
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
        r"\(modelopt, W4A16_AWQ\): only FP8, .* start from the original",
    ),
    "awq-gemv": (
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        "layout gemv with 4 bits: only gemm with 4 bits is supported, start from the original",
    ),
    "mxfp6": (
        {"quant_method": "compressed-tensors", "format": "mxfp6-pack-quantized",
         "config_groups": {"a": {"targets": ["Linear"], "weights": {}}}},
        "format mxfp6-pack-quantized: as a source only pack-quantized, .* start from the original",
    ),
    "transforms": (
        {"quant_method": "compressed-tensors", "transform_config": {"R1": {}}},
        "has transforms or sparse weights .* start from the original",
    ),
    "nothing": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        r"quantization_config \(fp8\), but no quantized weights: remove it from config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_are_refused_with_a_way_out(name: str, copy_of: Any) -> None:
    settings, message = REFUSED[name]
    folder = copy_of("llama")
    with edited_json(folder / "config.json") as config:
        config["quantization_config"] = settings
    with pytest.raises(RoundwiseError, match=message) as raised:
        open_streamed_model(folder)
    assert raised.value.exit_code == 2
