"""`--lm-head`: the output head is quantized too, and untied from the embedding if necessary."""

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
from roundwise.errors import ConfigError
from roundwise.model.streamed import open_streamed_model
from roundwise.plan.plan import plan
from roundwise.verify import audit
from tests.helpers import (
    ARCHITECTURES,
    LLAMA,
    Stop,
    contents,
    edited_json,
    random_model,
    raw,
    stop_after,
    tensors_of,
    windows,
)

CONFIG = rw.QuantizeConfig(group_size=32, lm_head=True)
HEADS = {"gpt_neox": "embed_out"}  # in its files
MODES = pytest.mark.parametrize("mode", ["true_sequential", "block"])


def quantize(model: Path, out: Path, **changes: Any) -> rw.QuantizeResult:
    settings = {"config": CONFIG, "calibration": windows(), "samples": 4, "seq_len": 32}
    return rw.quantize(model, out, **{**settings, "batch_size": 2, **changes})


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model, _ = rw.load(folder, dtype=torch.float64)
    return model(input_ids=torch.tensor(windows(seed=9))).logits


def saved(folder: Path, *, tied: bool) -> Path:
    config = transformers.Qwen3Config(**LLAMA, tie_word_embeddings=tied)
    random_model(config).save_pretrained(folder)
    assert ("lm_head.weight" in tensors_of(folder)) != tied
    return folder


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder, head = folder_of(name), HEADS.get(name, "lm_head")
    planned = plan(open_streamed_model(folder, lm_head=True), CONFIG, samples=4, seq_len=32)
    result = quantize(folder, tmp_path / "out")
    assert result.layers[-1]["name"] == "lm_head"
    assert result.layers[-1]["tokens"] == 4 * 32
    assert 0 < result.layers[-1]["relative_error"] < 0.05
    assert planned.bytes_after == result.bytes_after
    assert planned.bits_per_weight == pytest.approx(result.bits_per_weight)
    assert audit(tmp_path / "out").failures == []
    assert audit(tmp_path / "out", against=Checkpoint(folder)).failures == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["lm_head"]
    assert not config.get("tie_word_embeddings")
    assert f"{head}.qweight" in tensors_of(tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "dense", "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "dense"))


@MODES
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_embedding_is_copied_and_the_head_is_untied(
    tied: bool, mode: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model", tied=tied)
    # Without corrections for earlier errors, which change weights on purpose.
    config = CONFIG.merged({"alpha": 0.0, "beta": 0.0})
    quantize(folder, tmp_path / "out", mode=mode, config=config)
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    embedding = "model.embed_tokens.weight"
    assert raw(before[embedding]) == raw(after[embedding])
    assert "lm_head.weight" not in after
    model, _ = rw.load(tmp_path / "out")
    W = model.get_output_embeddings().dequantize().T
    original = before[embedding if tied else "lm_head.weight"]
    assert float((W - original).norm() / original.norm()) < 0.15
    assert not torch.equal(W, model.get_input_embeddings().weight)


def test_saving_and_loading_again(tmp_path: Path) -> None:
    quantize(saved(tmp_path / "model", tied=True), tmp_path / "out")
    model, _ = rw.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert set(tensors_of(tmp_path / "out")) == set(tensors_of(tmp_path / "again"))
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "out"))


def test_the_head_is_fitted_to_inputs_of_the_quantized_model(tmp_path: Path) -> None:
    """Its Hessian is that of the last norm's output after quantized blocks."""
    folder = saved(tmp_path / "model", tied=True)
    config = CONFIG.merged({"recipe": "textbook", "order": "natural", "alpha": 0.0, "beta": 0.0})
    result = quantize(folder, tmp_path / "out", config=config)
    model, _ = rw.load(tmp_path / "out", dtype=torch.float64)
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor(windows()))
    X = seen[0].reshape(-1, 64)
    W = tensors_of(folder)["model.embed_tokens.weight"].double()
    E = W - head.dequantize(torch.float64).T
    error = (X @ E.T).square().sum() / (X @ W.T).square().sum()
    assert result.layers[-1]["relative_error"] == pytest.approx(float(error), rel=1e-3)


@pytest.mark.sampled(3)
@MODES
@pytest.mark.parametrize("count", [7, 8, 15, 16, 17])
def test_a_stopped_run_resumes_and_gives_the_same_bytes(
    count: int, mode: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model", tied=True)
    quantize(folder, tmp_path / "whole", mode=mode)
    with pytest.raises(Stop):
        quantize(folder, tmp_path / "out", progress=stop_after(count), mode=mode)
    assert not any((tmp_path / "out").glob("*logits*"))
    quantize(folder, tmp_path / "out", mode=mode)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_width_of_its_own_and_a_skipped_head(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tied=True)
    config = CONFIG.model_copy(update={"dynamic": {"lm_head": {"bits": 8}}})
    assert quantize(folder, tmp_path / "out", config=config).layers[-1]["bits"] == 8
    quantize(folder, tmp_path / "rtn", config=CONFIG.merged({"method": "rtn"}), calibration=None)
    for out in ("out", "rtn"):
        convert(tmp_path / out, tmp_path / f"{out}-dense", "dense", dtype=torch.float32)
        torch.testing.assert_close(logits(tmp_path / out), logits(tmp_path / f"{out}-dense"))


def test_with_rotation(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tied=True)
    quantize(folder, tmp_path / "out", config=CONFIG.merged({"rotate": True, "bits": 8}))
    assert audit(tmp_path / "out", against=Checkpoint(folder)).failures == []
    difference = logits(tmp_path / "out") - logits(folder)
    assert float(difference.norm() / logits(folder).norm()) < 0.05


def test_a_vocabulary_that_cannot_be_packed(tmp_path: Path) -> None:
    random_model(transformers.LlamaConfig(**{**LLAMA, "vocab_size": 131})).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"multiples of 8, .* \(such as lm_head, 131 x 64\)"):
        quantize(tmp_path, tmp_path / "out")


def test_verify_refuses_a_quantized_head_that_the_config_ties(tmp_path: Path) -> None:
    quantize(saved(tmp_path / "model", tied=True), tmp_path / "out")
    (tmp_path / "out" / "roundwise.json").unlink()
    with edited_json(tmp_path / "out" / "config.json") as config:
        config["tie_word_embeddings"] = True
    assert any(
        "ties it to the embedding" in failure for failure in audit(tmp_path / "out").failures
    )
