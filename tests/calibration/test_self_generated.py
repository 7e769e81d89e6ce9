"""Calibration text that the model generates itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.calibration import self_generated
from roundwise.calibration.self_generated import generate_windows
from roundwise.checkpoint.reader import Checkpoint
from roundwise.config import CalibrationConfig
from roundwise.errors import CalibrationError

SETTINGS: dict[str, Any] = {"samples": 5, "seq_len": 24, "batch_size": 2}


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny)


def test_windows_are_sampled_from_the_model(tiny: Path, tokenizer: Any) -> None:
    before = torch.get_rng_state()
    windows = generate_windows(Checkpoint(tiny), tokenizer, CalibrationConfig(**SETTINGS, seed=3))
    assert torch.equal(before, torch.get_rng_state())
    assert [len(window) for window in windows] == [24] * 5
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    assert {window[0] for window in windows} == {begin}
    assert len({tuple(window) for window in windows}) == 5
    assert windows == generate_windows(
        Checkpoint(tiny), tokenizer, CalibrationConfig(**SETTINGS, seed=3)
    )
    assert windows != generate_windows(
        Checkpoint(tiny), tokenizer, CalibrationConfig(**SETTINGS, seed=4)
    )
    # The model finds them far more likely than random tokens.
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    generated = torch.tensor(windows)
    noise = torch.randint(4096, generated.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = [float(model(input_ids=ids, labels=ids).loss) for ids in (generated, noise)]
    assert losses[0] < losses[1] - 3


def test_no_text_is_needed(tiny: Path, tmp_path: Path, commands: Any) -> None:
    options = ["--samples", 8, "--seq-len", 64, "--recipe", "textbook", "--json"]
    made = commands.run("quantize", tiny, tmp_path / "out", "--calibration", "self", *options)
    assert made.code == 0, made.stderr
    assert all(layer["tokens"] == 8 * 64 for layer in made.json["layers"])
    again = commands.run(
        "quantize", "--from-manifest", tmp_path / "out", "--output", tmp_path / "again", "--json"
    )
    assert again.code == 0, again.stderr
    assert again.json["same"] is True


def test_mixed_with_other_texts(tiny: Path, text: Path, tmp_path: Path) -> None:
    result = rw.quantize(
        tiny, tmp_path, rw.QuantizeConfig(recipe="textbook"), f"self:0.5,{text}:0.5",
        samples=8, seq_len=32, batch_size=4,
    )  # fmt: skip
    assert result.layers[0]["tokens"] == 8 * 32


def test_models_that_cannot_generate_are_refused(
    tiny: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.BertConfig(
        vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match="BertModel cannot generate text"):
        generate_windows(Checkpoint(tmp_path), tokenizer, CalibrationConfig(**SETTINGS, seed=0))
    monkeypatch.setattr(self_generated, "available_memory", lambda _: 1000)
    with pytest.raises(CalibrationError, match="must fit into memory"):
        generate_windows(Checkpoint(tiny), tokenizer, CalibrationConfig(**SETTINGS, seed=0))
