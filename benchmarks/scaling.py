"""Estimates the cost of each part of a run on 1, 8 or 64 processes, and measures one and two.

    python benchmarks/scaling.py             estimate: 8B to 671B parameters, on CPU cores and on GPUs
    python benchmarks/scaling.py --measure   a generated Llama with one and two ranks, one thread each

The estimate counts operations and bytes (as `roundwise plan` does) and divides by rates. The rates
of a core are measured in a short trial. The rates of a GPU come from a data sheet, multiplied by
the share that each phase reaches on a core: they are assumed, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from memory import SHAPES, write_model

from roundwise.config import QuantizeConfig
from roundwise.plan.cost_model import (
    EFFICIENCY,
    BlockShapes,
    LinearShape,
    measure_flops,
    phase_flops,
)
from roundwise.run.resume import PACE
from roundwise.system.device import HOST

TOKENS = 128 * 2048
RANKS = (1, 8, 64)


@dataclass(frozen=True)
class Machine:
    """Rates of one rank: operations per second, and bytes per second to other ranks and the disk."""

    name: str
    model_flops: float
    """Operations per second of products in the model's dtype."""
    float32_flops: float
    near: float
    """Bytes per second between ranks on the same machine."""
    far: float
    """Bytes per second between ranks on different machines."""
    local: int
    """Ranks on one machine."""
    disk: float
    paced: bool = False
    """Activations are saved at a pace (`run.resume.PACE`), not after every block."""


#: 8 x H100 SXM per node: peak dense bfloat16 and float32, NVLink one way, 400 Gbit/s per GPU.
H100 = Machine("H100 (data sheet)", 989e12, 67e12, 450e9, 50e9, 8, 5e9, paced=True)


def llama(hidden: int, intermediate: int, blocks: int, kv: int) -> BlockShapes:
    """Returns the shapes of a block of a dense Llama in bfloat16."""
    q, o = LinearShape(hidden, hidden), LinearShape(hidden, hidden)
    key_value, gate_up = LinearShape(kv, hidden), LinearShape(intermediate, hidden)
    down = LinearShape(hidden, intermediate)
    linears = [q, key_value, key_value, o, gate_up, gate_up, down]
    return BlockShapes(
        linears, [q, o, gate_up, down], 2 * sum(x.entries for x in linears), hidden, 2, blocks, HOST
    )


def deepseek() -> BlockShapes:
    """Returns the shapes of a block of DeepSeek-V3: MLA, a shared expert, 8 of 256 experts per token."""
    hidden, expert, share = 7168, 2048, 8 / 256
    attention = [
        LinearShape(1536, hidden), LinearShape(24576, 1536), LinearShape(576, hidden),
        LinearShape(32768, 512), LinearShape(hidden, 16384),
    ]  # fmt: skip
    shared = [LinearShape(expert, hidden), LinearShape(expert, hidden), LinearShape(hidden, expert)]
    routed = [LinearShape(x.rows, x.columns, share) for x in shared]
    inputs = [*attention[1:], *shared[1:], *(256 * routed[1:])]
    linears = [*attention, *shared, *(256 * routed)]
    return BlockShapes(linears, inputs, 2 * sum(x.entries for x in linears), hidden, 2, 61, HOST)


MODELS = {
    "8B": llama(4096, 14336, 32, 1024),
    "70B": llama(8192, 28672, 80, 1024),
    "405B": llama(16384, 53248, 126, 1024),
    "671B, experts": deepseek(),
}


def seconds_of_parts(
    shapes: BlockShapes, config: QuantizeConfig, machine: Machine, ranks: int, tokens: int
) -> dict[str, float]:
    """Returns the seconds of each part of a run on its slowest rank."""
    seconds: dict[str, float] = {}
    for phase, flop in phase_flops(shapes, config, tokens=tokens, mode="true_sequential").items():
        peak = (
            machine.model_flops
            if phase in ("forward", "hessian", "drift")
            else machine.float32_flops
        )
        # Every rank factors all Hessians; everything else is split over the ranks.
        share = 1 if phase == "factor" else ranks
        seconds[phase] = flop / (EFFICIENCY[phase] * peak) / share
    streams = 2 if config.needs_reference else 1
    sums = sum(x.columns**2 for x in shapes.inputs)
    if config.needs_reference:
        sums += sum(min(x.rows, x.columns) * x.columns for x in shapes.inputs)
    # Ring all-reduce: each byte of a sum is sent twice, each byte of codes once.
    sent = shapes.blocks * (8 * sums + sum(x.entries for x in shapes.linears)) * (ranks - 1) / ranks
    seconds["exchange"] = sent / (machine.near if ranks <= machine.local else machine.far)
    activations = streams * tokens * shapes.hidden * shapes.itemsize / ranks
    packed = shapes.block_bytes / shapes.itemsize / 2 * 1.06
    seconds["disk"] = shapes.blocks * (shapes.block_bytes + packed) / machine.disk
    written = shapes.blocks * activations / machine.disk
    seconds["disk"] += min(written, sum(seconds.values()) / PACE) if machine.paced else written
    return seconds


def print_estimate(config: QuantizeConfig) -> None:
    """Prints the tables of docs/scaling.md."""
    torch.set_num_threads(1)
    rates = [measure_flops(dtype, HOST) for dtype in (torch.bfloat16, torch.float32)]
    core = Machine("one core, measured", *rates, 2e9, 1e9, 64, 1e9)
    print(
        f"one core: {core.model_flops / 1e9:.0f} GFLOPS bfloat16, {core.float32_flops / 1e9:.0f} float32"
    )
    for machine in (core, H100):
        print(f"\n{machine.name}, {config.recipe}, {TOKENS:,} tokens; hours\n")
        heads = ["forward", "hessian", "drift", "factor", "solve", "refine", "exchange", "disk"]
        print("| model | ranks | " + " | ".join(heads) + " | all |")
        print("|---" * (len(heads) + 3) + "|")
        for name, shapes in MODELS.items():
            for ranks in RANKS:
                seconds = seconds_of_parts(shapes, config, machine, ranks, TOKENS)
                hours = [seconds.get(head, 0.0) / 3600 for head in heads]
                cells = " | ".join(f"{h:.3g}" for h in [*hours, sum(hours)])
                print(f"| {name} | {ranks} | {cells} |")


def measure(recipe: str, blocks: int) -> None:
    """Quantizes a generated Llama with one and two ranks of one thread; prints the phases."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "model"
        source.mkdir()
        sizes = SHAPES["1.2b"] | {"hidden": 1024, "intermediate": 2816, "blocks": blocks}
        write_model(source, **sizes)
        script = Path(scratch) / "run.py"
        script.write_text(
            "import random, sys, roundwise as rw\n"
            "from roundwise.system.distributed import join_process_group\n"
            "draw = random.Random(0)\n"
            "windows = [[draw.randrange(32000) for _ in range(512)] for _ in range(64)]\n"
            "with join_process_group():\n"
            f"    rw.quantize({str(source)!r}, sys.argv[1], rw.QuantizeConfig(recipe={recipe!r}),\n"
            "        windows, samples=64, seq_len=512, batch_size=8)\n"
        )
        records = []
        for ranks in (1, 2):
            out = Path(scratch) / f"out-{ranks}"
            torchrun = [
                "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            ]  # fmt: skip
            subprocess.run(
                [sys.executable, *(torchrun if ranks > 1 else []), str(script), str(out)],
                check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            records.append(json.loads((out / "roundwise-run.json").read_text()))
    print(f"{blocks} blocks, {recipe}: seconds of the first rank\n")
    print("| phase | one rank | two | ratio |\n|---|---|---|---|")
    one, two = ({**each["phases"], "all": each["seconds"]} for each in records)
    for phase in sorted({**two, **one}, key=lambda phase: -one.get(phase, 0.0)):
        before, after = one.get(phase, 0.0), two.get(phase, 0.0)
        ratio = f"{before / after:.2f}" if min(before, after) > 0.05 else ""
        print(f"| {phase} | {before:.1f} | {after:.1f} | {ratio} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--recipe", choices=["best", "textbook"], default="best")
    parser.add_argument("--blocks", type=int, default=4)
    args = parser.parse_args()
    if args.measure:
        measure(args.recipe, args.blocks)
    else:
        print_estimate(QuantizeConfig(recipe=args.recipe))


if __name__ == "__main__":
    main()
