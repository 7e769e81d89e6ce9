"""transformers loads our checkpoints: device maps, offloading, pipelines, damaged groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.errors import CheckpointError
from roundwise.inference.quant_linear import QuantLinear
from tests.inference.checkpoints import LAYER, logits, rewritten

PLACES = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
ON_DISK = {**dict.fromkeys(PLACES, "cpu"), "model.layers.1": "disk"}


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


@pytest.mark.parametrize("value", [3, -1])
def test_a_g_idx_beyond_the_groups(
    value: int, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.g_idx"][5] = value

    folder = rewritten(quantized("llama"), tmp_path / "out", change)
    with pytest.raises(CheckpointError, match=r"g_idx has groups .* but the layer has 3 groups"):
        rw.load(folder)
