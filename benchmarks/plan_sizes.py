"""Prints sizes and memory that `plan` states for models of 8B and 70B parameters, without weights.

    python benchmarks/plan_sizes.py
    python benchmarks/plan_sizes.py --docs docs/deployment.md

The checkpoints are those of Llama 3.1 in shape: headers in sparse files. `--docs` replaces the table.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
from pathlib import Path

import torch
import transformers
from accuracy import insert

from roundwise.config import QuantizeConfig
from roundwise.model.streamed import open_streamed_model
from roundwise.plan.plan import plan
from roundwise.system.memory import format_size

SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64},
}  # fmt: skip
SAMPLES, LENGTH, BATCH = 128, 2048, 8


def write_headers(folder: Path, shape: dict[str, int]) -> None:
    """Writes config.json and files that have headers and no weights.

    Args:
        folder: an empty folder.
        shape: sizes of the model.
    """
    config = transformers.LlamaConfig(
        **shape, num_key_value_heads=8, vocab_size=128_256, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], max_position_embeddings=131_072,
    )  # fmt: skip
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--docs", type=Path, help="document whose table is replaced")
    args = parser.parse_args()
    lines = [
        f"| {SAMPLES} x {LENGTH} tokens | bits | weights before and after | peak memory of the run "
        "| the same, `--mode block` | disk | GPUs that can share it |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as scratch:
            write_headers(Path(scratch), shape)
            streamed = open_streamed_model(Path(scratch))
            for bits in (4, 3):
                planned, block = (
                    plan(streamed, QuantizeConfig(bits=bits), samples=SAMPLES, seq_len=LENGTH,
                         batch_size=BATCH, mode=mode, budget=1 << 50)
                    for mode in ("true_sequential", "block")
                )  # fmt: skip
                degrees = ", ".join(map(str, planned.tensor_parallel))
                lines.append(
                    f"| {name} | {bits} | {format_size(planned.bytes_before)}, "
                    f"{format_size(planned.bytes_after)} | {format_size(planned.memory.peak_bytes)} "
                    f"| {format_size(block.memory.peak_bytes)} "
                    f"| {format_size(sum(planned.disk.values()))} | {degrees} |"
                )
    table = "\n".join(lines)
    print(table)
    if args.docs:
        insert(table, args.docs, "plan")


if __name__ == "__main__":
    main()
