"""How fast a model is quantized, phase by phase, against what this machine can do at all.

    python benchmarks/quantize.py                      8 blocks, hidden 1024, 64 x 512 tokens
    python benchmarks/quantize.py --blocks 24
    python benchmarks/quantize.py --against gptqmodel  alternating with a peer: A B A B
    python benchmarks/quantize.py --solver             one layer: against the published column loop
    python benchmarks/quantize.py --hessian            against the published accumulation
    python benchmarks/quantize.py --forward            half precision: as torch does it, and widened

The limits are measured first: matrix products in float32 and bfloat16. Floating-point operations are
counted from the shapes; a symmetric update counts half. Times are wall clock: on a shared machine only
ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import write_model
from peers.environments import python_of
from transformers import AutoModelForCausalLM

import roundwise as rw
from roundwise.core import native
from roundwise.core.columns import Columns
from roundwise.core.hessian import Hessian
from roundwise.core.order import columns_of
from roundwise.core.solver import prepare
from roundwise.core.widen import multiplies, widening
from roundwise.models.bundled import bundled_model

HERE = Path(__file__).parent
HIDDEN, INTERMEDIATE, HEADS = 1024, 2816, 16
LENGTH = 512
#: What a peer is asked for: its defaults, at our batch size.
PEERS: dict[str, dict[str, Any]] = {
    "gptqmodel": {"bits": 4, "group_size": 128},
    "llmcompressor": {"bits": 4, "group_size": 128, "sym": True},
}


def seconds(work: Callable[[], Any], repeat: int = 5) -> float:
    """Median time of `work`, after one run to warm up."""
    work()
    times = []
    for _ in range(repeat):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def limits() -> dict[str, float]:
    """GFLOPS of matrix products of this machine, by dtype."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        A, B = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        found[name] = 2 * 2048**3 / seconds(lambda A=A, B=B: A @ B) / 1e9
    return found


def work_of(blocks: int, tokens: int, recipe: str) -> dict[str, float]:
    """GFLOP of each phase, counted from the shapes."""
    d, m = HIDDEN, INTERMEDIATE
    weights = 4 * d * d + 3 * d * m
    attention = 2 * 2 * LENGTH * d * tokens  # scores and values, causal masks are not skipped
    streams = 2 if recipe == "best" else 1
    squares = 3 * d**2 + m**2  # inputs: of q/k/v, o, gate/up, down
    products = 3 * d * d * d + d * d * d + 2 * m * d * d + d * m * m  # out · in² of every linear
    work = {
        "forward": streams * (2 * weights * tokens + attention),
        "hessian": tokens * squares,
        "factor": (3 * d**3 + m**3) / 3,
        # Panels look back at half of the columns; the energy of W; the correction T, and its loss.
        "solve": products * (2 + (3 if recipe == "best" else 0)),
    }
    if recipe == "best":
        # Of q/k/v and gate/up in the input, times W once; of o and down as it reaches the output.
        moments = 2 * d * d + 2 * (d * d + d * m)
        work["drift"] = 2 * tokens * moments + 2 * (3 * d**3 + 2 * m * d * d)
        # T Ĥ once, the gradient, two refits (half, they are symmetric). Exchanges are not products.
        work["refine"] = products * (2 + 2 + 2 * 1)
    return {phase: blocks * flop / 1e9 for phase, flop in work.items()}


def job(scratch: Path, blocks: int, samples: int) -> dict[str, Any]:
    """Writes the model; the calibration is random, as the weights are."""
    model = scratch / "model"
    if not model.exists():
        write_model(model, HIDDEN, INTERMEDIATE, blocks, HEADS, HEADS)
        for file in bundled_model().glob("tokenizer*"):  # peers want one, if only to save it
            shutil.copy(file, model)
    draw = random.Random(0)
    windows = [[draw.randrange(32000) for _ in range(LENGTH)] for _ in range(samples)]
    return {"model": str(model), "windows": windows}


def run(tool: str, scratch: Path, task: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """One job in a process of its own; seconds, peak memory, and ours by phase."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        request, answer = Path(folder) / "job.json", Path(folder) / "result.json"
        request.write_text(json.dumps({**task, "out": f"{folder}/out", "settings": settings}))
        script = HERE / "peers" / f"run_{tool}.py"
        done = subprocess.run(
            [python_of(tool), script, request, answer],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode or not answer.exists():
            raise SystemExit(f"{tool} failed:\n{done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(answer.read_text())
    print(f"  {tool} {settings}: {result['seconds']:.1f} s", file=sys.stderr, flush=True)
    if "error" in result:
        raise SystemExit(f"{tool} failed: {result['error']}")
    return result


def show(name: str, result: dict[str, Any], work: dict[str, float], roof: dict[str, float]) -> None:
    """The phases of one of our runs, each with the share of the roof that it reaches."""
    print(
        f"\n{name}: {result['seconds']:.1f} s, peak {result['peak_bytes'] / 1e6:.0f} MB, "
        f"{(result['peak_bytes'] - result['base_bytes']) / 1e6:.0f} MB above imports"
    )
    print("| phase | seconds | share | GFLOP | GFLOPS | of the roof |\n|---|---|---|---|---|---|")
    total = sum(result["phases"].values())
    for phase, spent in sorted(result["phases"].items(), key=lambda item: -item[1]):
        cells = [phase, f"{spent:.2f}", f"{spent / total:.0%}", "", "", ""]
        if phase in work:
            dtype = "bfloat16" if phase in ("forward", "hessian", "drift") else "float32"
            rate = work[phase] / spent
            cells[3:] = [
                f"{work[phase]:.0f}",
                f"{rate:.0f}",
                f"{rate / roof[dtype]:.0%} of {dtype}",
            ]
        print("| " + " | ".join(cells) + " |")


def whole(blocks: int, samples: int, against: list[str], repeat: int, scratch: Path) -> None:
    """Both recipes, and peers alternating with them."""
    roof = limits()
    print("limits: " + ", ".join(f"{k} {v:.0f} GFLOPS" for k, v in roof.items()))
    print(
        f"Llama, {blocks} blocks, hidden {HIDDEN}, intermediate {INTERMEDIATE}, bfloat16; "
        f"{samples} x {LENGTH} tokens; {torch.get_num_threads()} threads, "
        f"native {native.load()[1].active}"
    )
    task = job(scratch, blocks, samples)
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(repeat):
        for recipe in ("textbook", "best"):
            found = run("roundwise", scratch, task, {"recipe": recipe})
            results.setdefault(f"roundwise {recipe}", []).append(found)
        for tool in against:
            results.setdefault(tool, []).append(run(tool, scratch, task, PEERS[tool]))
    medians = {
        name: sorted(runs, key=lambda r: r["seconds"])[len(runs) // 2]
        for name, runs in results.items()
    }
    for recipe in ("textbook", "best"):
        name = f"roundwise {recipe}"
        show(name, medians[name], work_of(blocks, samples * LENGTH, recipe), roof)
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


def published(W: torch.Tensor, H: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """GPTQ as published (algorithm 1 with lazy batches of 128), column by column in torch."""
    W, H, width, maxq = W.clone(), H.clone(), W.shape[1], 2**bits - 1
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q, zero = torch.zeros_like(W), (maxq + 1) // 2
    for a in range(0, width, 128):
        b = min(a + 128, width)
        block, errors = W[:, a:b].clone(), torch.zeros_like(W[:, a:b])
        for j in range(a, b):
            if j % group == 0:
                part = W[:, j : j + group]
                scale = 2 * part.abs().amax(dim=1, keepdim=True) / maxq
            w = block[:, j - a : j - a + 1]
            q = scale * (torch.clamp(torch.round(w / scale) + zero, 0, maxq) - zero)
            Q[:, j : j + 1] = q
            error = (w - q) / U[j, j]
            block[:, j - a :] -= error @ U[j : j + 1, j:b]
            errors[:, j - a : j - a + 1] = error
        W[:, b:] -= errors @ U[a:b, b:]
    return Q


def rounded(W: torch.Tensor, H: torch.Tensor, config: rw.QuantizeConfig) -> Columns:
    """What the published loop does: damping, factor, codes and scales, and the loss."""
    prepared = prepare(H, config)
    columns = Columns(
        columns_of(W, prepared.order.perm), prepared.factor, prepared.order, config, None
    )
    columns.round_all()
    return columns


def solver() -> None:
    """4 bit, groups of 128, float32: the textbook's rounding alone, and all of `rw.solve`.

    `rw.solve` also measures the relative error, which costs a product with the Hessian.
    """
    print("| layer | published | rounding | ratio | solve, textbook | solve, best | loss ratio |")
    print("|---|---|---|---|---|---|---|")
    textbook, best = (rw.QuantizeConfig(recipe=recipe) for recipe in ("textbook", "best"))
    for width in (1024, 2048, 4096):
        X = torch.randn(2 * width, width) * torch.linspace(0.2, 3.0, width)
        X = X @ (torch.eye(width) + 0.3 * torch.randn(width, width) / width**0.5)
        H, W = X.T @ X / len(X), 0.02 * torch.randn(width, width)
        del X
        loop = seconds(lambda W=W, H=H: published(W, H, 4, 128), 1 if width > 2048 else 3)
        core = seconds(lambda W=W, H=H: rounded(W, H, textbook))
        whole = [seconds(lambda W=W, H=H, c=c: rw.solve(W, H, c), 3) for c in (textbook, best)]
        E, P = W - rw.solve(W, H, textbook).dequantize(), W - published(W, H, 4, 128)
        ratio = float(((E @ H) * E).sum() / ((P @ H) * P).sum())
        print(
            f"| {width} x {width} | {loop:.2f} s | {core:.3f} s | **{loop / core:.1f}x** "
            f"| {whole[0]:.3f} s | {whole[1]:.3f} s | {ratio:.4f} |",
            flush=True,
        )


def hessian() -> None:
    """4096 tokens against H *= n/(n+k); X *= √(2/n); H += XᵀX, in float32."""
    print("| width | input | published | ours | ratio |\n|---|---|---|---|---|")
    for width in (1024, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            X, total = torch.randn(4096, width).to(dtype), torch.zeros(width, width)

            def accumulate(X: torch.Tensor = X, total: torch.Tensor = total) -> None:
                total *= 0.5
                rows = X.float() * 0.01
                total += rows.T @ rows

            ours = Hessian(width)
            loop, fast = seconds(accumulate), seconds(lambda X=X, ours=ours: ours.add(X))
            name = str(dtype).removeprefix("torch.")
            print(
                f"| {width} | {name} | {loop * 1e3:.0f} ms | {fast * 1e3:.0f} ms "
                f"| **{loop / fast:.2f}x** |",
                flush=True,
            )


def forward() -> None:
    """8 x 512 tokens through the bundled model: what the processor cannot multiply, and widened."""
    model = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (8, LENGTH))

    def hidden() -> torch.Tensor:
        return model.model(input_ids=ids, use_cache=False).last_hidden_state.float()

    print("| type | torch multiplies it here | as torch does it | as a run does it | ratio |")
    print("|---|---|---|---|---|")
    with torch.no_grad():
        for dtype in (torch.float16, torch.bfloat16):
            model.to(dtype)
            plain = seconds(hidden, 3)
            with widening():
                ours = seconds(hidden, 3)
            name, there = str(dtype).removeprefix("torch."), "yes" if multiplies(dtype) else "no"
            print(f"| {name} | {there} | {plain:.2f} s | {ours:.2f} s | **{plain / ours:.1f}x** |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--samples", type=int, default=64, help=f"windows of {LENGTH} tokens")
    parser.add_argument("--against", choices=PEERS, action="append", default=[])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--solver", action="store_true")
    parser.add_argument("--hessian", action="store_true")
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--scratch", type=Path, help="where models are written")
    args = parser.parse_args()
    if args.solver:
        solver()
    if args.hessian:
        hessian()
    if args.forward:
        forward()
    if not (args.solver or args.hessian or args.forward):
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            whole(args.blocks, args.samples, args.against, args.repeat, Path(scratch))


if __name__ == "__main__":
    main()
