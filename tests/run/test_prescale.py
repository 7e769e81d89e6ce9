"""Activation-aware scales in a run: a plain checkpoint, resumable, verified; `method=awq`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.checkpoint.quantized_layers import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import ConfigError, OutputError
from roundwise.verify import audit
from tests.conftest import BEST, QUICK
from tests.helpers import (
    ARCHITECTURES,
    Commands,
    Stop,
    assign,
    contents,
    edited_json,
    random_model,
    raw,
    stop_after,
    tensors_of,
    windows,
)

SCALED = QUICK.merged({"prescale": "awq"})
AWQ = rw.QuantizeConfig(group_size=32, method="awq")
NORMS = [
    f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")
]


def quantize(model: Path, out: Path, **changes: Any) -> rw.QuantizeResult:
    settings = {"config": SCALED, "calibration": windows(16), "samples": 16, "seq_len": 32}
    return rw.quantize(model, out, **{**settings, **changes})


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The small model of an architecture with a few outlier channels."""

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path_factory.mktemp(name)
        model = random_model(ARCHITECTURES[name].config())
        with torch.no_grad():
            for parameter, value in model.named_parameters():
                if value.shape == (64,) and parameter.endswith("weight"):
                    value[[5, 40]] *= 20
        model.to(dtype).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def outliers(lopsided: Callable[..., Path]) -> Path:
    """A small Llama with outlier channels, in bfloat16."""
    return lopsided("llama", torch.bfloat16)


def unscaled(source: Path, result: rw.QuantizeResult) -> dict[str, torch.Tensor]:
    """Each quantized weight divided by its scales, to be used with the original norms."""
    before, after = tensors_of(source), tensors_of(result.output)
    records = {layer["name"]: layer["prescale"] for layer in result.layers}
    weights = {}
    for layer in quantized_layers(Checkpoint(result.output)):
        Q = layer.read().dequantize()
        record = next(r for name, r in records.items() if name.endswith(layer.name))
        if record is not None:
            gains = [t[record["norm"]].float() + record["offset"] for t in (before, after)]
            Q = Q * gains[1] / gains[0]
        weights[layer.name] = Q
    return weights


@pytest.mark.parametrize("config", [SCALED, BEST.merged({"prescale": "awq"}), AWQ])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon"])
def test_the_checkpoint_computes_the_same_as_the_running_model(
    name: str, config: rw.QuantizeConfig, lopsided: Callable[..., Path], tmp_path: Path
) -> None:
    source = lopsided(name)
    result = quantize(source, tmp_path / "out", config=config)
    assert any(layer["prescale"] for layer in result.layers)
    dense = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    for linear, Q in unscaled(source, result).items():
        assign(dense, linear, Q)
    model, _ = rw.load(result.output)
    ids = torch.tensor(windows(seed=5))
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-3, atol=1e-4
        )


def test_only_norms_in_front_of_scaled_layers_change(outliers: Path, tmp_path: Path) -> None:
    result = quantize(outliers, tmp_path / "out")
    before, after = tensors_of(outliers), tensors_of(result.output)
    changed = {n for n in before if n in after and raw(before[n]) != raw(after[n])}
    assert changed
    assert changed == {layer["prescale"]["norm"] for layer in result.layers if layer["prescale"]}
    for layer in result.layers:
        record = layer["prescale"]
        if layer["name"].endswith(("o_proj", "down_proj")):
            assert record is None  # they do not read a norm
        elif record is not None:
            assert 0 < record["ratio"] < 1


def test_the_recorded_error_is_that_on_the_unscaled_input(outliers: Path, tmp_path: Path) -> None:
    # The first group of the first block has the same inputs as in the original model.
    result = quantize(outliers, tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    line = next(layer for layer in result.layers if layer["name"] == name)
    assert line["prescale"]
    dense = transformers.AutoModelForCausalLM.from_pretrained(outliers).eval()
    seen: list[torch.Tensor] = []
    linear = dense.get_submodule(name)
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 64).float()))
    with torch.no_grad():
        dense(input_ids=torch.tensor(windows(16)))
    W, Q = linear.weight.detach().float(), unscaled(outliers, result)[name]
    error = (seen[0] @ (W - Q).T).square().sum() / (seen[0] @ W.T).square().sum()
    assert line["relative_error"] == pytest.approx(float(error), rel=0.01)


def test_scales_reduce_the_error_of_models_with_outlier_channels(
    outliers: Path, tmp_path: Path
) -> None:
    original, _ = rw.load(outliers, dtype=torch.float32)
    ids = torch.tensor(windows(seed=5))
    losses: dict[str, float] = {}
    with torch.no_grad():
        before = original(input_ids=ids).logits
        for method in ("rtn", "awq"):
            quantize(outliers, tmp_path / method, config=AWQ.merged({"method": method}))
            model, _ = rw.load(tmp_path / method, dtype=torch.float32)
            losses[method] = float((model(input_ids=ids).logits - before).norm())
    assert losses["awq"] < 0.8 * losses["rtn"]


@pytest.mark.parametrize("config", [SCALED, AWQ, SCALED.merged({"rotate": True})])
def test_verify_against_the_original(
    config: rw.QuantizeConfig, outliers: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = quantize(outliers, out, config=config)
    assert any(layer["prescale"] for layer in result.layers)
    report = audit(out, against=Checkpoint(outliers))
    assert not report.failures
    assert report.checked["weight errors"] == 14
    assert Checkpoint(out).config["quantization_config"]["meta"]["prescale"] == "awq"
    # The weight error of a layer whose scales are not recorded does not match.
    with edited_json(out / "roundwise.json") as manifest:
        manifest["files"] = {}
        line = next(layer for layer in manifest["layers"] if layer["prescale"])
        record, line["prescale"] = line["prescale"], None
    failures = audit(out, against=Checkpoint(outliers)).failures
    assert any(line["name"] in failure and "weight error" in failure for failure in failures)
    with edited_json(out / "roundwise.json") as manifest:
        next(x for x in manifest["layers"] if x["name"] == line["name"])["prescale"] = {
            **record, "norm": "nowhere",
        }  # fmt: skip
    failures = audit(out, against=Checkpoint(outliers)).failures
    assert any("has an invalid prescale entry" in failure for failure in failures)


@pytest.mark.parametrize("count", [3, 8, 11])
@pytest.mark.parametrize("config", [BEST.merged({"prescale": "awq"}), AWQ])
def test_a_stopped_run_gives_the_same_bytes(
    config: rw.QuantizeConfig, count: int, outliers: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        quantize(outliers, tmp_path / "out", config=config, progress=stop_after(count))
    quantize(outliers, tmp_path / "out", config=config)
    quantize(outliers, tmp_path / "fresh", config=config)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_run_does_not_resume_with_other_scaling(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        quantize(llama, tmp_path / "out", progress=stop_after(8))
    with pytest.raises(OutputError, match=r"differs in config\.prescale \(awq -> none\)"):
        quantize(llama, tmp_path / "out", config=QUICK)


def test_a_group_with_a_skipped_layer_is_not_scaled(outliers: Path, tmp_path: Path) -> None:
    # Scaling its norm would change the skipped layer too.
    config = rw.QuantizeConfig(
        **{**SCALED.model_dump(), "dynamic": {r"0\.self_attn\.k_proj": None}}
    )
    result = quantize(outliers, tmp_path / "out", config=config)
    before, after = tensors_of(outliers), tensors_of(tmp_path / "out")
    scaled = {layer["name"] for layer in result.layers if layer["prescale"]}
    assert "model.layers.0.self_attn.q_proj" not in scaled
    assert "model.layers.1.self_attn.q_proj" in scaled
    assert raw(before[NORMS[0]]) == raw(after[NORMS[0]])
    name = "model.layers.0.self_attn.k_proj.weight"
    assert raw(before[name]) == raw(after[name])


def test_without_scales_the_records_do_not_mention_them(llama: Path, tmp_path: Path) -> None:
    result = quantize(llama, tmp_path / "out", config=QUICK)
    assert not any("prescale" in layer for layer in result.layers)
    assert "prescale" not in Checkpoint(tmp_path / "out").config["quantization_config"]["meta"]


def test_a_run_needs_activations(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prescale=awq needs activations.*use method=awq"):
        rw.QuantizeConfig(method="rtn", prescale="awq")
    with pytest.raises(rw.RoundwiseError, match="awq needs calibration text"):
        quantize(llama, tmp_path / "out", config=AWQ, calibration=None)


def test_other_architectures_support_the_method(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("qwen3", "opt", "gpt_neox", "bloom"):  # those that no test above uses
        result = quantize(folder_of(name), tmp_path / name, config=AWQ)
        assert all(layer["fallback"] is None for layer in result.layers)
        assert not audit(tmp_path / name, against=Checkpoint(folder_of(name))).failures


def test_from_the_command_line(
    commands: Commands, text_model: Path, text: Path, tmp_path: Path
) -> None:
    command = (
        "quantize", text_model, tmp_path / "out", "--calibration", text, "--group-size", 32,
        "--samples", 2, "--seq-len", 32, "--recipe", "textbook",
    )  # fmt: skip
    for index, options in enumerate((("--method", "awq"), ("--prescale", "awq"))):
        out = tmp_path / f"out-{index}"
        ended = commands.run(*command[:2], out, *command[3:], *options, "--json")
        assert ended.code == 0, ended.stderr
        assert any(layer["prescale"] for layer in ended.json["layers"])
        ended = commands.run("verify", out, "--against", text_model)
        assert ended.code == 0, ended.stderr
