"""Mixtures of experts, from the original checkpoint to the loaded quantized one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.convert import convert
from roundwise.errors import ConfigError, FallbackError
from roundwise.model.streamed import open_streamed_model
from roundwise.plan.plan import plan
from roundwise.verify import audit
from tests.helpers import Stop, contents, raw, stop_after, tensors_of, windows
from tests.mixtures import MIXTURES

CONFIG = rw.QuantizeConfig(group_size=32, expert_tokens=30)
NAMES = pytest.mark.parametrize("name", MIXTURES)
MODES = pytest.mark.parametrize("mode", ["true_sequential", "block"])


def quantize(model: Path, out: Path, **changes: Any) -> rw.QuantizeResult:
    settings = {"config": CONFIG, "calibration": windows(), "samples": 4, "seq_len": 32}
    return rw.quantize(model, out, **{**settings, "batch_size": 2, **changes})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.tensor(windows(seed=9))).logits


def check_logits(out: Path, scratch: Path) -> None:
    """Checks that the loaded checkpoint equals transformers with the dequantized weights.

    In float64, so that rounding does not decide which expert a token is routed to.
    """
    convert(out, scratch, "dense", dtype=torch.float32)
    plain, report = transformers.AutoModelForCausalLM.from_pretrained(
        scratch, dtype=torch.float64, experts_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    ours, _ = rw.load(out, dtype=torch.float64)
    ours.set_experts_implementation("eager")  # for experts that are not quantized
    torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-6, atol=1e-6)


@pytest.mark.sampled(3)
@MODES
@NAMES
def test_planned_quantized_verified_and_loaded(
    name: str, mode: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    planned = plan(open_streamed_model(folder_of(name)), CONFIG, samples=4, seq_len=32)
    result = quantize(folder_of(name), tmp_path / "out", mode=mode)
    assert not planned.problems
    blocks = {n: w for n, w in tensors_of(folder_of(name)).items() if ".layers." in n}
    quantized = sum(m.shape[0] * m.shape[1] for m in planned.modules if m.bits)
    assert quantized > 0.93 * sum(weight.numel() for weight in blocks.values())
    assert planned.bytes_after == result.bytes_after
    assert planned.bits_per_weight == pytest.approx(result.bits_per_weight)
    assert {m.name for m in planned.modules if m.bits} == {line["name"] for line in result.layers}
    for against in (None, Checkpoint(folder_of(name))):
        report = audit(tmp_path / "out", against=against)
        assert report.failures == []
    assert report.checked["weight errors"] == len(result.layers)
    stored = {n.rpartition(".")[0] for n in tensors_of(tmp_path / "out") if n.endswith("qweight")}
    assert MIXTURES[name].stored in stored
    assert len(stored) == len(result.layers)
    check_logits(tmp_path / "out", tmp_path / "dense")


@NAMES
def test_all_other_tensors_are_copied_byte_for_byte(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize(folder_of(name), tmp_path)
    before, after = tensors_of(folder_of(name)), tensors_of(tmp_path)
    kept = [key for key in before if key in after]
    assert any("router" in key or ".gate." in key for key in kept)
    assert all(raw(before[key]) == raw(after[key]) for key in kept)
    if name == "gpt_oss":  # biases belong to their layers now
        fused = before["model.layers.1.mlp.experts.gate_up_proj_bias"]
        assert torch.equal(after["model.layers.1.mlp.experts.2.gate_proj.bias"], fused[2, :96])
        assert torch.equal(after["model.layers.1.mlp.experts.2.up_proj.bias"], fused[2, 96:])


@pytest.mark.sampled(3)
@MODES
@NAMES
def test_coverage_is_in_the_result_and_the_manifest(
    name: str, mode: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = CONFIG.merged({"expert_tokens": 60})
    result = quantize(folder_of(name), tmp_path, mode=mode, config=config)
    manifest = json.loads((tmp_path / "roundwise.json").read_text())
    assert result.as_dict()["experts"] == manifest["experts"]
    assert result.experts[0]["name"] == MIXTURES[name].experts
    assert all(
        sum(line["tokens"]) == 2 * 4 * 32 for line in result.experts
    )  # two experts per token
    few = 0
    for line in result.experts:
        for expert, tokens in enumerate(line["tokens"]):
            prefix = f"{line['name']}.{expert}."
            for layer in (x for x in result.layers if x["name"].startswith(prefix)):
                assert layer["tokens"] == (tokens if tokens >= 60 else 4 * 32)
                assert (layer["fallback"] is not None) == (tokens < 60)
            few += tokens < 60
    assert few
    assert any("few of 128 calibration tokens" in text for text in result.not_as_asked)
    others = [x for x in result.layers if ".experts." not in x["name"]]
    assert not any(layer["fallback"] for layer in others)


@MODES
def test_all_tokens_are_counted_for_every_expert(
    mode: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = CONFIG.merged({"experts": "all"})
    result = quantize(folder_of("mixtral"), tmp_path / "out", mode=mode, config=config)
    assert {layer["tokens"] for layer in result.layers} == {4 * 32}
    assert not any(layer["fallback"] for layer in result.layers)
    assert sum(result.experts[0]["tokens"]) == 2 * 4 * 32  # coverage counts the router's choices
    check_logits(tmp_path / "out", tmp_path / "dense")


def test_too_few_tokens_are_an_error_if_strict(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = CONFIG.merged({"expert_tokens": 1000})
    with pytest.raises(FallbackError, match=r"experts\.0\.w1: \d+ of .* fewer than 1000"):
        quantize(folder_of("mixtral"), tmp_path, config=config, strict=True)


def test_an_expert_without_tokens_and_without_a_minimum_is_rounded_and_reported(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    # One window of one token that is routed to two of four experts.
    config = CONFIG.merged({"expert_tokens": 0, "recipe": "textbook"})
    result = quantize(
        folder_of("qwen3_moe"), tmp_path, config=config, samples=1, calibration=[[7] * 32]
    )
    empty = [
        f"{line['name']}.{expert}."
        for line in result.experts
        for expert, tokens in enumerate(line["tokens"])
        if not tokens
    ]
    assert empty
    for layer in result.layers:
        reached = not layer["name"].startswith(tuple(empty))
        assert (layer["fallback"] is None) == reached
        assert (layer["relative_error"] is not None) == reached


@pytest.mark.sampled(5)
@pytest.mark.parametrize("changes", [{}, {"experts": "all"}], ids=["routed", "all"])
@MODES
def test_a_stopped_run_resumes_and_gives_the_same_bytes(
    mode: str, changes: dict[str, str], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = CONFIG.merged({**changes, "expert_tokens": 60})
    options = {"mode": mode, "config": config}
    quantize(folder_of("mixtral"), tmp_path / "whole", **options)
    for count in (5, 12, 17, 20, 33):
        out = tmp_path / f"stopped-{count}"
        with pytest.raises(Stop):
            quantize(folder_of("mixtral"), out, progress=stop_after(count), **options)
        quantize(folder_of("mixtral"), out, **options)
        assert contents(out) == contents(tmp_path / "whole"), count


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_skipped_experts_are_copied(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"dynamic": {"experts": None}})
    result = quantize(folder_of(name), tmp_path / "out", config=config)
    assert not any("experts" in layer["name"] for layer in result.layers)
    before, after = tensors_of(folder_of(name)), tensors_of(tmp_path / "out")
    experts = [key for key in before if "experts" in key]
    assert experts
    assert all(raw(before[key]) == raw(after[key]) for key in experts)
    assert audit(tmp_path / "out", against=Checkpoint(folder_of(name))).failures == []
    check_logits(tmp_path / "out", tmp_path / "dense")


def test_some_experts_of_a_block_cannot_be_skipped(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"dynamic": {r"experts\.2\.w1": None}})
    with pytest.raises(ConfigError, match=r"experts\.2\.w1 is skipped and .* quantize all experts"):
        quantize(folder_of("mixtral"), tmp_path / "out", config=config)
    planned = plan(open_streamed_model(folder_of("mixtral")), config, samples=4, seq_len=32)
    assert any("quantize all experts" in problem for problem in planned.problems)


@pytest.mark.parametrize(
    ("name", "dynamic", "refusing"),
    [
        ("mixtral", {}, {"vLLM, CPU", "llama.cpp", "GPTQModel"}),
        ("qwen3_moe", {}, {"vLLM, CPU", "llama.cpp"}),
        ("gpt_oss", {}, {"vLLM, CPU", "vLLM, GPU", "SGLang", "llama.cpp"}),
        ("gpt_oss", {"experts": None}, {"llama.cpp"}),
        (
            "qwen3_moe",
            {"down_proj": {"group_size": 16}},
            {"vLLM, CPU", "vLLM, GPU", "SGLang", "llama.cpp"},
        ),
    ],
)
def test_plan_names_the_engines_that_serve_it(
    name: str, dynamic: dict[str, Any], refusing: set[str], folder_of: Callable[[str], Path]
) -> None:
    config = CONFIG.model_copy(update={"dynamic": dynamic})
    planned = plan(open_streamed_model(folder_of(name)), config, samples=4, seq_len=32)
    assert {engine for engine, reason in planned.served_by.items() if reason} == refusing


def test_experts_may_have_another_width(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"dynamic": {r"experts\.\d+\.w2": {"bits": 8}}})
    result = quantize(folder_of("mixtral"), tmp_path / "out", config=config)
    assert {x["bits"] for x in result.layers if x["name"].endswith("w2")} == {8}
    check_logits(tmp_path / "out", tmp_path / "dense")


def test_rounding_to_nearest_needs_no_tokens(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = rw.QuantizeConfig(group_size=32, method="rtn")
    result = quantize(folder_of("gpt_oss"), tmp_path / "out", config=config, calibration=None)
    assert result.experts == []
    check_logits(tmp_path / "out", tmp_path / "dense")


def test_a_model_whose_router_reads_a_norm_cannot_be_rotated(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="cannot be rotated"):
        quantize(folder_of("mixtral"), tmp_path / "out", config=CONFIG.merged({"rotate": True}))


def test_a_mixture_that_is_saved_again_does_not_change(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize(folder_of("gpt_oss"), tmp_path / "out")
    model, _ = rw.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
    assert set(before) == set(after)
    assert torch.equal(logits(rw.load(tmp_path / "again")[0]), logits(model))
