"""What each part of a run costs on 1, 8 or 64 processes, and how far that is from what is measured.

    python benchmarks/scaling.py             the model: 8B to 671B parameters, on CPU cores and on GPUs
    python benchmarks/scaling.py --measure   a generated Llama with one and two ranks of a thread each

The model counts operations and bytes (`roundwise plan` counts the same) and divides by rates. Those of a
core are measured here, in a trial. Those of a GPU are a data sheet's, with the share of them that
each phase reaches on a core: they are assumed, not measured.
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
from roundwise.plan.cost_model import EFFICIENCY, BlockShapes, LinearShape, rate, work
from roundwise.run.resume import PACE
from roundwise.system.device import HOST

TOKENS = 128 * 2048
RANKS = (1, 8, 64)


@dataclass(frozen=True)
class Machine:
    """What a rank does in a second, and what it gets from elsewhere."""

    name: str
    model_flops: float
    """Products in the model's dtype."""
    float32_flops: float
    near: float
    """Bytes to and from ranks on the same machine."""
    far: float
    """Bytes to and from ranks on others; `local` ranks are on one."""
    local: int
    disk: float
    paced: bool = False
    """Batches are written down at a pace, not behind every block."""


#: 8 x H100 SXM a node: dense bfloat16 and float32 peaks, NVLink one way, 400 Gbit/s for each GPU.
H100 = Machine("H100 (data sheet)", 989e12, 67e12, 450e9, 50e9, 8, 5e9, paced=True)


def llama(hidden: int, intermediate: int, blocks: int, kv: int) -> BlockShapes:
    """A block of a dense Llama in bfloat16."""
    q, o = LinearShape(hidden, hidden), LinearShape(hidden, hidden)
    small, wide, down = (
        LinearShape(kv, hidden),
        LinearShape(intermediate, hidden),
        LinearShape(hidden, intermediate),
    )
    linears = [q, small, small, o, wide, wide, down]
    return BlockShapes(
        linears, [q, o, wide, down], 2 * sum(x.entries for x in linears), hidden, 2, blocks, HOST
    )


def deepseek() -> BlockShapes:
    """A block of DeepSeek-V3: 256 experts of which a token passes 8, one shared, MLA."""
    hidden, expert, part = 7168, 2048, 8 / 256
    attention = [LinearShape(1536, hidden), LinearShape(24576, 1536), LinearShape(576, hidden), LinearShape(32768, 512),
                 LinearShape(hidden, 16384)]  # fmt: skip
    shared = [LinearShape(expert, hidden), LinearShape(expert, hidden), LinearShape(hidden, expert)]
    routed = [LinearShape(x.rows, x.columns, part) for x in shared]
    inputs = [*attention[1:], *shared[1:], *(256 * routed[1:])]
    linears = [*attention, *shared, *(256 * routed)]
    return BlockShapes(linears, inputs, 2 * sum(x.entries for x in linears), hidden, 2, 61, HOST)


MODELS = {
    "8B": llama(4096, 14336, 32, 1024),
    "70B": llama(8192, 28672, 80, 1024),
    "405B": llama(16384, 53248, 126, 1024),
    "671B, experts": deepseek(),
}


def parts(
    shapes: BlockShapes, config: QuantizeConfig, machine: Machine, ranks: int, tokens: int
) -> dict[str, float]:
    """Seconds of each part of a run, as its slowest rank spends them."""
    found: dict[str, float] = {}
    for phase, flop in work(shapes, config, tokens=tokens, mode="true_sequential").items():
        peak = (
            machine.model_flops
            if phase in ("forward", "hessian", "drift")
            else machine.float32_flops
        )
        # All ranks factor the same Hessians; all else is shared.
        share = 1 if phase == "factor" else ranks
        found[phase] = flop / (EFFICIENCY[phase] * peak) / share
    streams = 2 if config.needs_reference else 1
    sums = sum(x.columns**2 for x in shapes.inputs)
    if config.needs_reference:
        sums += sum(min(x.rows, x.columns) * x.columns for x in shapes.inputs)
    # A ring: each byte of a sum passes twice, each byte of codes once.
    sent = shapes.blocks * (8 * sums + sum(x.entries for x in shapes.linears)) * (ranks - 1) / ranks
    found["exchange"] = sent / (machine.near if ranks <= machine.local else machine.far)
    activations = streams * tokens * shapes.hidden * shapes.itemsize / ranks
    packed = shapes.block_bytes / shapes.itemsize / 2 * 1.06
    found["disk"] = shapes.blocks * (shapes.block_bytes + packed) / machine.disk
    written = shapes.blocks * activations / machine.disk
    found["disk"] += min(written, sum(found.values()) / PACE) if machine.paced else written
    return found


def print_model(config: QuantizeConfig) -> None:
    """The table of the docs."""
    torch.set_num_threads(1)
    rates = [rate(dtype, HOST) for dtype in (torch.bfloat16, torch.float32)]
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
                found = parts(shapes, config, machine, ranks, TOKENS)
                hours = [found.get(head, 0.0) / 3600 for head in heads]
                cells = " | ".join(f"{h:.3g}" for h in [*hours, sum(hours)])
                print(f"| {name} | {ranks} | {cells} |")


def measure(recipe: str, blocks: int) -> None:
    """One and two ranks, a thread each, on a generated Llama; phases side by side."""
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
        found = []
        for ranks in (1, 2):
            out = Path(scratch) / f"out-{ranks}"
            torchrun = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(ranks),
            ]
            subprocess.run(
                [sys.executable, *(torchrun if ranks > 1 else []), str(script), str(out)],
                check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            found.append(json.loads((out / "roundwise-run.json").read_text()))
    print(f"{blocks} blocks, {recipe}: seconds of the first rank\n")
    print("| phase | one rank | two | ratio |\n|---|---|---|---|")
    one, two = ({**each["phases"], "all": each["seconds"]} for each in found)
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
        print_model(QuantizeConfig(recipe=args.recipe))


if __name__ == "__main__":
    main()
