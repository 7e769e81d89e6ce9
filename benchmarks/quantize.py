"""Measures the speed of quantization, phase by phase, against the limits of the machine.

    python benchmarks/quantize.py                      8 blocks, hidden 1024, 64 x 512 tokens
    python benchmarks/quantize.py --blocks 24
    python benchmarks/quantize.py --shape 1.2b --blocks 3 --samples 128
    python benchmarks/quantize.py --against gptqmodel  alternating with a peer: A B A B
    python benchmarks/quantize.py --max-memory 700MB   textbook with a memory budget, too
    python benchmarks/quantize.py --solver             one layer, against the published column loop
                                                       (--against gptqmodel: and its solver)
    python benchmarks/quantize.py --hessian            against the published accumulation
    python benchmarks/quantize.py --forward            half precision: torch alone, and as a run does it

The limits are measured first: matrix products in float32 and bfloat16. Floating-point operations are
counted from the shapes; a symmetric update counts half. Times are wall-clock times: on a shared machine,
compare only ratios within one run.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from memory import write_model
from parts import LENGTH, forward, hessian, seconds, solver
from peers.environments import python_of
from peers.methods import settings_of

from roundwise.core.backends import cpp
from roundwise.core.linalg import matmul
from roundwise.system.hub import bundled_model

HERE = Path(__file__).parent
#: Hidden and intermediate size, heads, and heads of keys and values.
SHAPES = {"small": (1024, 2816, 16, 16), "1.2b": (2048, 5632, 32, 8)}
#: Settings of each peer: its defaults, with our batch size.
PEERS: dict[str, dict[str, Any]] = {
    tool: settings_of(tool, {}, 4, 128, sym=True) for tool in ("gptqmodel", "llmcompressor")
}
PEERS["llmcompressor"]["batch_size"] = 8


def limits() -> dict[str, float]:
    """Returns the GFLOPS of matrix products on this machine, by dtype."""
    gflops = {}
    for dtype in (torch.float32, torch.bfloat16):
        A, B = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        gflops[name] = 2 * 2048**3 / seconds(lambda A=A, B=B: matmul(A, B)) / 1e9
    return gflops


def work_of(shape: str, blocks: int, tokens: int, recipe: str) -> dict[str, float]:
    """Returns the GFLOP of each phase, counted from the shapes."""
    d, m, heads, kv_heads = SHAPES[shape]
    qkv = d + 2 * d * kv_heads // heads
    weights = (qkv + d) * d + 3 * d * m
    attention = 2 * 2 * LENGTH * d * tokens  # scores and values; masked positions are computed too
    streams = 2 if recipe == "best" else 1
    squares = 3 * d**2 + m**2  # inputs of q/k/v, o, gate/up and down
    products = (qkv + d + 2 * m) * d * d + d * m * m  # out · in² of every linear
    work = {
        "forward": streams * (2 * weights * tokens + attention),
        "hessian": tokens * squares,
        "factor": (3 * d**3 + m**3) / 3,
        # Look-back at half of the columns on average, and tr(W H Wᵀ); for `best` the correction
        # of the target, and its loss.
        "solve": products * (2 + (3 if recipe == "best" else 0)),
    }
    if recipe == "best":
        # q/k/v and gate/up: moments of the input, multiplied by W once. o and down: moments of the
        # output, minus W H.
        moments = 2 * d * d + d * d + d * m
        work["drift"] = 2 * tokens * moments + 2 * products
        # T Ĥ once, the gradient, two refits (half of a product each, because they are symmetric).
        # The exchange of codes is not a product.
        work["refine"] = products * (2 + 2 + 2 * 1)
    return {phase: blocks * flop / 1e9 for phase, flop in work.items()}


def write_job(scratch: Path, shape: str, blocks: int, samples: int) -> dict[str, Any]:
    """Writes the model and returns the job; weights and calibration tokens are random."""
    model = scratch / "model"
    if not model.exists():
        hidden, intermediate, heads, kv_heads = SHAPES[shape]
        write_model(model, hidden, intermediate, blocks, heads, kv_heads)
        for file in bundled_model().glob("tokenizer*"):  # peers need one, at least for saving it
            shutil.copy(file, model)
    draw = random.Random(0)
    windows = [[draw.randrange(32000) for _ in range(LENGTH)] for _ in range(samples)]
    return {"model": str(model), "windows": windows}


def run(tool: str, scratch: Path, job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Runs one job in a separate process; returns seconds, peak memory and, for ours, phases."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        request, answer = Path(folder) / "job.json", Path(folder) / "result.json"
        request.write_text(json.dumps({**job, "out": f"{folder}/out", "settings": settings}))
        script = HERE / "peers" / f"run_{tool}.py"
        done = subprocess.run(
            [python_of(tool), script, request, answer],
            cwd=folder,  # some tools write logs into the current folder
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode or not answer.exists():
            raise SystemExit(f"{tool} failed:\n{done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(answer.read_text())
    print(f"  {tool} {settings}: {result['seconds']:.1f} s", file=sys.stderr, flush=True)
    if "error" in result:
        raise SystemExit(f"{tool} failed: {result['error']}")
    return result


def print_phases(
    name: str, result: dict[str, Any], work: dict[str, float], limit: dict[str, float]
) -> None:
    """Prints the phases of one of our runs, each with its share of the machine's limit."""
    print(
        f"\n{name}: {result['seconds']:.1f} s, peak {result['peak_bytes'] / 1e6:.0f} MB, "
        f"{(result['peak_bytes'] - result['base_bytes']) / 1e6:.0f} MB above imports"
    )
    print("| phase | seconds | share | GFLOP | GFLOPS | of the limit |\n|---|---|---|---|---|---|")
    total = sum(result["phases"].values())
    for phase, spent in sorted(result["phases"].items(), key=lambda item: -item[1]):
        cells = [phase, f"{spent:.2f}", f"{spent / total:.0%}", "", "", ""]
        if phase in work:
            dtype = "bfloat16" if phase in ("forward", "hessian", "drift") else "float32"
            rate = work[phase] / spent
            cells[3:] = [
                f"{work[phase]:.0f}",
                f"{rate:.0f}",
                f"{rate / limit[dtype]:.0%} of {dtype}",
            ]
        print("| " + " | ".join(cells) + " |")


def measure_runs(
    shape: str, blocks: int, samples: int, against: list[str], budgets: list[str], repeat: int,
    scratch: Path,
) -> None:  # fmt: skip
    """Measures both recipes, each memory budget, and the peers, alternating."""
    limit = limits()
    print("limits: " + ", ".join(f"{k} {v:.0f} GFLOPS" for k, v in limit.items()))
    print(
        f"Llama, {blocks} blocks, hidden {SHAPES[shape][0]}, intermediate {SHAPES[shape][1]}, bfloat16; "
        f"{samples} x {LENGTH} tokens; {torch.get_num_threads()} threads, "
        f"native {cpp.load()[1].active}"
    )
    job = write_job(scratch, shape, blocks, samples)
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(repeat):
        for recipe in ("textbook", "best"):
            for budget in (None, *(budgets if recipe == "textbook" else ())):
                settings = {"recipe": recipe} | ({"max_memory": budget} if budget else {})
                name = f"roundwise {recipe}" + (f", --max-memory {budget}" if budget else "")
                result = run("roundwise", scratch, job, settings)
                results.setdefault(name, []).append(result)
        for tool in against:
            results.setdefault(tool, []).append(run(tool, scratch, job, PEERS[tool]))
    medians = {
        name: sorted(runs, key=lambda r: r["seconds"])[len(runs) // 2]
        for name, runs in results.items()
    }
    for recipe in ("textbook", "best"):
        name = f"roundwise {recipe}"
        print_phases(name, medians[name], work_of(shape, blocks, samples * LENGTH, recipe), limit)
    print("\n| | seconds (all runs) | peak MB | time against textbook | peak against textbook |")
    print("|---|---|---|---|---|")
    base = medians["roundwise textbook"]
    for name, runs in results.items():
        middle = medians[name]
        times = ", ".join(f"{r['seconds']:.1f}" for r in runs)
        print(
            f"| {name} | **{middle['seconds']:.1f}** ({times}) | {middle['peak_bytes'] / 1e6:.0f} "
            f"| {middle['seconds'] / base['seconds']:.2f} "
            f"| {middle['peak_bytes'] / base['peak_bytes']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--samples", type=int, default=64, help=f"windows of {LENGTH} tokens")
    parser.add_argument("--against", choices=PEERS, action="append", default=[])
    parser.add_argument("--max-memory", action="append", default=[])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--solver", action="store_true")
    parser.add_argument("--hessian", action="store_true")
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--scratch", type=Path, help="folder for the models")
    args = parser.parse_args()
    if args.solver:
        solver(against="gptqmodel" in args.against)
    if args.hessian:
        hessian()
    if args.forward:
        forward()
    if not (args.solver or args.hessian or args.forward):
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            measure_runs(
                args.shape, args.blocks, args.samples, args.against, args.max_memory, args.repeat,
                Path(scratch).resolve(),
            )  # fmt: skip


if __name__ == "__main__":
    main()
