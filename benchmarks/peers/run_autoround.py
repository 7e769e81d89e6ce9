"""Runs AutoRound; settings are keyword arguments of AutoRound(...). Exports as auto_gptq."""

import os
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")  # before it is imported

import torch
from auto_round import AutoRound
from measure import run

BATCH = 8


def quantize(model: str, out: str, windows: list[list[int]], settings: dict[str, Any]) -> None:
    """Quantizes a model; see `measure.Quantize`."""
    ids = torch.tensor(windows)
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(BATCH)
    ]
    tool = AutoRound(
        model, dataset=batches, nsamples=len(windows), seqlen=len(windows[0]), batch_size=BATCH,
        device_map="cpu", **settings,
    )  # fmt: skip
    tool.quantize_and_save(out, format="auto_gptq")


if __name__ == "__main__":
    run("auto-round", quantize)
