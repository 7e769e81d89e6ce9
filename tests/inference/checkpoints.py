"""Helpers for tests that load checkpoints and change them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.helpers import tensors_of, windows

#: A layer of the small Llama, in files and in the model: 96 input and 64 output channels.
LAYER = "model.layers.0.mlp.down_proj"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.tensor(windows(seed=9))).logits


def rewritten(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint as one file, its tensors changed."""
    shutil.copytree(source, out)
    tensors = tensors_of(out)
    for file in [*out.glob("*.safetensors"), *out.glob("*.index.json")]:
        file.unlink()
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
