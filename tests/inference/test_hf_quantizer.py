"""What users of transformers do with a checkpoint: device maps, offloading, pipelines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.inference.quant_linear import QuantLinear
from tests.helpers import windows

PLACES = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
ON_DISK = {**dict.fromkeys(PLACES, "cpu"), "model.layers.1": "disk"}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.tensor(windows(seed=9))).logits


@pytest.mark.parametrize("first", ["roundwise", "transformers"])
def test_importing_roundwise_is_enough(first: str, quantized: Callable[..., Path]) -> None:
    """Before transformers or after it, and without waiting for either."""
    second = {"roundwise": "transformers", "transformers": "roundwise"}[first]
    script = f"""
import sys
import {first}
assert {first!r} == "transformers" or not {{"torch", "transformers"}} & set(sys.modules)
import {second}
model = transformers.AutoModelForCausalLM.from_pretrained({str(quantized("llama"))!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "QuantLinear\n", done.stderr


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(device_map: Any, quantized: Callable[..., Path]) -> None:
    folder = quantized("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert torch.equal(logits(model), logits(rw.load(folder)[0]))


@pytest.mark.parametrize("buffers", [False, True])
def test_blocks_on_disk(buffers: bool, quantized: Callable[..., Path], tmp_path: Path) -> None:
    """With `offload_buffers` the packed weights stay in their file and come for each product."""
    folder = quantized("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map=ON_DISK, offload_folder=tmp_path, offload_buffers=buffers
    )
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, QuantLinear)
    expected = logits(rw.load(folder)[0])
    for _ in range(2):
        assert torch.equal(logits(model), expected)
        assert (layer.kernel is None) == buffers


def test_pipeline(tiny: Path, text: Path, tmp_path: Path) -> None:
    config = rw.QuantizeConfig(recipe="textbook")
    rw.quantize(tiny, tmp_path / "out", config, str(text), samples=2, seq_len=64)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "out"))
    assert any(isinstance(module, QuantLinear) for module in pipe.model.modules())
    prompt = "def read_file(path):\n"
    (answer,) = pipe(prompt, max_new_tokens=8, do_sample=False)
    model, tokenizer = rw.load(tmp_path / "out")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
    assert answer["generated_text"] == expected
