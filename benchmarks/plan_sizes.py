"""Prints sizes and memory that `plan` states for models of 8B and 70B parameters, without weights.

    python benchmarks/plan_sizes.py
    python benchmarks/plan_sizes.py --docs docs/deployment.md

The checkpoints are those of Llama 3.1 in shape: headers in sparse files. `--docs` replaces the table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import transformers
from accuracy import insert
from sparse import write_headers

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


def config_of(shape: dict[str, int]) -> transformers.LlamaConfig:
    """Returns the config of Llama 3.1 with these sizes."""
    return transformers.LlamaConfig(
        **shape, num_key_value_heads=8, vocab_size=128_256, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], max_position_embeddings=131_072,
    )  # fmt: skip


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
            write_headers(Path(scratch), config_of(shape))
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
