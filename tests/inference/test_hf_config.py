"""transformers reads every spelling of a GPTQ config, and does not ask how a checkpoint was made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from roundwise.errors import CheckpointError
from roundwise.inference.hf_config import GPTQConfig
from tests.handmade import PLAIN, write
from tests.inference.checkpoints import logits


@pytest.mark.parametrize(
    "made",
    [
        {"damp_percent": 0}, {"dataset": "ours"}, {"dataset": 3}, {"desc_act": False, "damp_percent": 2},
        {"modules_in_block_to_quantize": [["mlp.up_proj"]]}, {"backend": 7, "max_input_length": "x"},
    ],
)  # fmt: skip
def test_how_it_was_made_does_not_matter(made: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    expected = write(llama, tmp_path / "a", {**PLAIN, **made})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert {key: saved[key] for key in made} == made


def test_loading_attributes_of_the_caller(llama: Path, tmp_path: Path) -> None:
    expected = write(llama, tmp_path / "a", PLAIN)
    config = transformers.GPTQConfig(bits=4, backend="torch")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "a", quantization_config=config
        )
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-3)


def test_other_methods_are_left_to_transformers() -> None:
    awq = AutoQuantizationConfig.from_dict({"quant_method": "awq", "bits": 4})
    assert type(awq) is transformers.AwqConfig
    assert AutoHfQuantizer.supports_quant_method({"load_in_4bit": True})
    assert not AutoHfQuantizer.supports_quant_method({"quant_method": "unheard-of"})
    with pytest.raises(ValueError, match="no `quant_method` attribute"):
        AutoQuantizationConfig.from_dict({})


def test_the_class_keeps_what_it_was_given() -> None:
    config = AutoQuantizationConfig.from_dict({"method": "GPTQ", "bits": "8", "meta": {"a": [1]}})
    assert isinstance(config, GPTQConfig) and isinstance(config, transformers.GPTQConfig)
    assert (config.bits, config.format, config.quant_method) == (8, "gptq", "gptq")
    assert config.to_dict() == {
        "quant_method": "gptq", "bits": 8, "meta": {"a": [1]}, "checkpoint_format": "gptq",
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="bits='9'"):
        AutoQuantizationConfig.from_dict({"quant_method": "gptq", "bits": 9})


@pytest.mark.sampled(2)
@pytest.mark.parametrize("first", ["roundwise", "transformers.modeling_utils"])
@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "LlamaForCausalLM"])
def test_an_old_config_is_found(first: str, kind: str, llama: Path, tmp_path: Path) -> None:
    """quantize_config.json alone: without our hook, transformers fills the layers at random."""
    write(llama, tmp_path / "a", PLAIN, where="quantize_config.json")
    second = "transformers" if first == "roundwise" else "roundwise"
    script = f"""
import {first}, {second}, transformers
model = transformers.{kind}.from_pretrained({str(tmp_path / "a")!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "QuantLinear\n", done.stderr
