"""Writes checkpoints that have headers and no weights, to plan models that no disk here could hold."""

import json
import struct
from pathlib import Path

import torch
import transformers


def write_headers(folder: Path, config: transformers.PreTrainedConfig) -> None:
    """Writes config.json, the index, and a sparse file with a header for each tensor in bfloat16.

    Args:
        folder: an empty folder.
        config: config of a causal language model.
    """
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    places = {}
    for number, (name, weight) in enumerate(model.state_dict().items()):
        places[name] = f"model-{number:05d}.safetensors"
        size = weight.numel() * 2
        entry = {"dtype": "BF16", "shape": [*weight.shape], "data_offsets": [0, size]}
        header = json.dumps({name: entry}).encode()
        with (folder / places[name]).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
