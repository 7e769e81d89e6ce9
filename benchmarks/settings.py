"""Measures the cost of each setting in bits, accuracy and speed: the tables of docs/settings.md.

    python benchmarks/settings.py                          measures what has no result yet (an hour)
    python benchmarks/settings.py --table --docs docs/settings.md

The model, the held-out tokens, the reader and the evaluator are those of accuracy.py. There is one
seed, so differences of 5% are noise. `--speed` measures one row through a 4096 x 4096 layer,
against F.linear in bfloat16 on the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from accuracy import Results, insert, key_of, run
from kernels import copies, random_weight, seconds
from peers.environments import ROOT
from peers.evaluator import LENGTH, Evaluator
from peers.methods import Job
from peers.texts import split_source

from roundwise.inference.kernels.cpp import NativeKernel

DEFAULT = {"bits": 4, "group_size": 128, "sym": True}
WIDTHS: list[dict[str, Any]] = [DEFAULT | {"bits": bits} for bits in (2, 3, 4, 8)]
GROUPS = [DEFAULT | {"bits": b, "group_size": g} for b in (3, 4) for g in (32, 64, 128, 256, -1)]
LANES = [
    DEFAULT | {"bits": bits} | extra
    for bits in (3, 4)
    for extra in ({}, {"sym": False}, {"desc_act": True}, {"sym": False, "desc_act": True})
]
RECIPES = [DEFAULT | extra for extra in ({"method": "rtn"}, {"recipe": "textbook"}, {})]
SAMPLES = (8, 16, 32, 64, 128)
SIDE, ROUNDS = 4096, 5


class FewerWindows:
    """An evaluator that calibrates with only the first `samples` windows."""

    def __init__(self, evaluator: Evaluator, samples: int) -> None:
        self.model, self.evaluate, self.samples = evaluator.model, evaluator.evaluate, samples
        self.all_windows = evaluator.windows

    def windows(self, seed: int) -> list[list[int]]:
        """Returns the calibration windows of a seed."""
        return self.all_windows(seed)[: self.samples]


def job_of(settings: dict[str, Any], samples: int) -> Job:
    """Returns the job of some settings, calibrated with this many windows."""
    bits, group_size, sym = (settings[name] for name in ("bits", "group_size", "sym"))
    return Job("roundwise", f"{samples} windows", bits, group_size, sym, 0, settings)


def jobs() -> list[tuple[Job, int]]:
    """Returns all jobs with their numbers of calibration windows, without duplicates."""
    wanted = [(settings, SAMPLES[-1]) for settings in [*WIDTHS, *GROUPS, *LANES, *RECIPES]]
    wanted += [(DEFAULT | {"bits": 3}, samples) for samples in SAMPLES]
    unique: dict[str, tuple[Job, int]] = {}
    for settings, samples in wanted:
        job = job_of(settings, samples)
        unique[f"{sorted(settings.items())} {samples}"] = job, samples
    return list(unique.values())


def measure(evaluator: Evaluator, results: Results) -> None:
    """Measures all jobs that have no result yet."""
    for job, samples in jobs():
        key = key_of(job, evaluator.identity())
        if key not in results:
            logs = results.file.parent / "logs"
            result = run(job, FewerWindows(evaluator, samples), 1, logs)  # type: ignore[arg-type]
            results.add({"key": key, **result})
            print(
                job.settings, samples, result.get("error") or f"KL {result['kl']:.5f}", flush=True
            )


def table(rows: list[tuple[str, dict[str, Any]]], head: str) -> list[str]:
    """Returns rows of (name, record) as a markdown table."""
    lines = [
        f"| {head} | bits per weight | KL to the original | perplexity | top-1 agreement "
        "| CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in rows:
        lines.append(
            f"| {name} | {r['bits_per_weight']:.2f} | {r['kl']:.6f} | {r['perplexity']:.3f} | "
            f"{r['top1']:.2%} | {r['cpu_seconds']:.0f} |"
        )
    return lines


def report(evaluator: Evaluator, results: Results) -> str:
    """Returns all tables as markdown."""

    def record(settings: dict[str, Any], samples: int = SAMPLES[-1]) -> dict[str, Any]:
        job = job_of(settings, samples)
        return results.records[results._name(key_of(job, evaluator.identity()))]

    def lane(settings: dict[str, Any]) -> str:
        symmetry = "symmetric" if settings["sym"] else "asymmetric"
        order = ", act-order in the file" if settings.get("desc_act") else ""
        return f"{settings['bits']} bit, {symmetry}{order}"

    def group(settings: dict[str, Any]) -> str:
        size = settings["group_size"]
        return f"{settings['bits']} bit, " + ("per channel" if size < 0 else f"groups of {size}")

    def recipe(settings: dict[str, Any]) -> str:
        return settings.get("method") or settings.get("recipe") or "best (the default)"

    base = record(DEFAULT)["base_perplexity"]
    sections = [
        table([(f"{s['bits']} bit", record(s)) for s in WIDTHS], "width"),
        table([(recipe(s), record(s)) for s in RECIPES], "4 bit"),
        table([(group(s), record(s)) for s in GROUPS], "group size"),
        table([(lane(s), record(s)) for s in LANES], "lane"),
        table(
            [
                (f"{n} windows of {LENGTH} tokens", record(DEFAULT | {"bits": 3}, n))
                for n in SAMPLES
            ],
            "calibration, 3 bit",
        ),
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections)
    return f"{text}\n\nThe original's perplexity is {base:.3f}."


def speed() -> str:
    """Returns the table of one row through a layer, compared with bfloat16."""
    x = torch.randn(1, SIDE).bfloat16()
    dense = copies(torch.randn(SIDE, SIDE).bfloat16(), 2 * SIDE * SIDE)
    lines = ["| one row, 4096 x 4096 | times as fast as bfloat16 |", "|---|---|"]
    cases = [(bits, 128, False) for bits in (2, 3, 4, 8)]
    cases += [(4, 32, False), (4, 64, False), (4, SIDE, False), (4, 128, True)]
    for bits, group_size, act_order in cases:
        weight = random_weight(bits, SIDE, SIDE, group_size, act_order=act_order)
        ours = copies(NativeKernel(weight), SIDE * SIDE * bits / 8)
        ratios = []
        for _ in range(ROUNDS):
            mine = seconds(lambda kernel: kernel(x), ours)
            ratios.append(seconds(lambda w: torch.nn.functional.linear(x, w), dense) / mine)
        size = "per channel" if group_size == SIDE else f"groups of {group_size}"
        order = ", act-order" if act_order else ""
        lines.append(f"| {bits} bit, {size}{order} | {statistics.median(ratios):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=51_200, help="number of held-out tokens")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--table", action="store_true", help="only print the tables of existing results"
    )
    parser.add_argument("--speed", action="store_true", help="measure only the speed of a layer")
    parser.add_argument("--docs", type=Path, help="document whose tables are replaced")
    args = parser.parse_args()
    if args.speed:
        text, name = speed(), "speed"
    else:
        with tempfile.TemporaryDirectory() as scratch:
            calibration, held_out = split_source("python-stdlib", Path(scratch))
            evaluator = Evaluator(
                ROOT / "examples" / "tiny-llama", calibration, held_out, args.tokens
            )
            results = Results(args.cache / "settings.jsonl")
            if not args.table:
                measure(evaluator, results)
            text, name = report(evaluator, results), "settings"
    print(text)
    if args.docs:
        insert(text, args.docs, name)


if __name__ == "__main__":
    main()
