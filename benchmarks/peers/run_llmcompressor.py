"""Runs llm-compressor; settings: `weights` (QuantizationArgs), `batch_size`, GPTQModifier arguments."""

import os
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")  # before it is imported

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from measure import run
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(model: str, out: str, windows: list[list[int]], settings: dict[str, Any]) -> None:
    """Quantizes a model; see `measure.Quantize`."""
    settings = dict(settings)
    batch_size = settings.pop("batch_size", 4)
    groups = {"group_0": {"targets": ["Linear"], "weights": settings.pop("weights")}}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=settings.pop("dtype", "auto"))
    data = {"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]}
    oneshot(
        model=loaded,
        tokenizer=AutoTokenizer.from_pretrained(model),
        dataset=Dataset.from_dict(data),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"], **settings),
        num_calibration_samples=len(windows),
        max_seq_length=len(windows[0]),
        shuffle_calibration_samples=False,
        batch_size=batch_size,
    )
    loaded.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    run("llmcompressor", quantize)
