"""Measures the accuracy that quantization costs: roundwise, its ingredients and other quantizers.

    python benchmarks/accuracy.py                          everything; hours on two cores
    python benchmarks/accuracy.py --only roundwise         rtn, textbook and best, three seeds
    python benchmarks/accuracy.py --only roundwise --ablation --seeds 0
    python benchmarks/accuracy.py --only gptqmodel --bits 3 --seeds 0 --method default
    python benchmarks/accuracy.py --table --docs docs/accuracy.md    tables from existing results
    python benchmarks/accuracy.py --model DIR --text FILE  another model with its own text

Each job runs in a separate process, so its CPU time and peak memory (VmHWM) are measured alone. All
tools get the same calibration windows as token ids. One reader (peers/reader.py) decodes their
checkpoints, and one evaluator measures them in float32 on held-out tokens. Each peer has a virtual
environment under .venv-peers, created on first use (1 GB each). Results are stored as JSON lines and
are not measured again unless `--redo` is given. A failure is stored too: a refusal is a result.

A text FILE is split: the first nine tenths are calibration text, the last tenth is held out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.environments import HERE, ROOT, python_of
from peers.evaluator import Evaluator
from peers.methods import ABLATION, GROUPS, TOOLS, Job, jobs
from peers.table import ingredients, report
from peers.texts import split_source

from roundwise.run.environment import platform_info

TIMEOUT = 3 * 3600


class Results:
    """Results of measured jobs, stored as JSON lines. Only one process at a time may write."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        records = [json.loads(line) for line in lines]
        self.records = {self._name(record["key"]): record for record in records}

    @staticmethod
    def _name(key: dict[str, Any]) -> str:
        return json.dumps(key, sort_keys=True)

    def __contains__(self, key: dict[str, Any]) -> bool:
        return self._name(key) in self.records

    def add(self, record: dict[str, Any]) -> None:
        """Appends a record; it replaces an earlier record with the same key."""
        self.records[self._name(record["key"])] = record
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(json.dumps(record) + "\n")

    def of(self, identity: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the records of one model, text and held-out part."""
        records = self.records.values()
        return [r for r in records if all(r["key"][k] == v for k, v in identity.items())]


def key_of(job: Job, identity: dict[str, Any]) -> dict[str, Any]:
    """Returns everything that a result depends on; methods without calibration have seed 0."""
    return {
        **identity, "tool": job.tool, "method": job.method, "bits": job.bits,
        "group_size": job.group_size, "sym": job.sym, "seed": job.seed, "settings": job.settings,
    }  # fmt: skip


def run(job: Job, evaluator: Evaluator, threads: int, logs: Path) -> dict[str, Any]:
    """Runs one job in a separate process and evaluates the checkpoint that it wrote."""
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        out, answer = scratch / "checkpoint", scratch / "result.json"
        order = {
            "model": str(evaluator.model.resolve()), "out": str(out), "settings": job.settings,
            "windows": evaluator.windows(job.seed),
        }  # fmt: skip
        (scratch / "job.json").write_text(json.dumps(order))
        logs.mkdir(parents=True, exist_ok=True)
        name = f"{evaluator.model.name}-{job.row}-{job.format}-{job.seed}.log"
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        with (logs / name.replace(" ", "_")).open("w") as log:
            done = subprocess.run(
                [python_of(job.tool), HERE / f"run_{job.tool}.py", "job.json", "result.json"],
                cwd=scratch, stdout=log, stderr=subprocess.STDOUT, env=environment,
                timeout=TIMEOUT, check=False,
            )  # fmt: skip
        if not answer.exists():
            return {"error": f"no result: exit code {done.returncode}, see the log {name}"}
        result: dict[str, Any] = json.loads(answer.read_text())
        if "error" not in result:
            checkpoints = sorted(file.parent for file in out.rglob("config.json"))
            result |= evaluator.evaluate(checkpoints[0])
        return result


def measure(
    selected: list[Job],
    evaluator: Evaluator,
    results: Results,
    logs: Path,
    threads: int,
    redo: bool,
) -> None:
    """Measures all selected jobs that have no result yet.

    Args:
        selected: the jobs.
        evaluator: model, windows and held-out text.
        results: where records go.
        logs: folder for the output of the tools.
        threads: OMP_NUM_THREADS of every job.
        redo: measure again what has a result.
    """
    identity = evaluator.identity()
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    machine = f"{platform_info()['processor']}, {os.cpu_count()} CPUs, {threads} threads"
    for number, job in enumerate(selected, start=1):
        key = key_of(job, identity)
        if key in results and not redo:
            continue
        begun = time.strftime("%H:%M:%S")
        result = run(job, evaluator, threads, logs)
        if job.tool == "roundwise":
            result["commit"] = commit
        results.add({"key": key, "threads": threads, "machine": machine, **result})
        summary = result.get("error") or f"KL {result['kl']:.5f}, {result['cpu_seconds']:.0f} s"
        print(
            f"{begun} [{number}/{len(selected)}] {evaluator.model.name}: {job.row}, {job.format}, "
            f"seed {job.seed}: {summary}",
            flush=True,
        )


def insert(tables: str, docs: Path, name: str) -> None:
    """Replaces the text between the two markers of this name in a document."""
    begin, end = f"<!-- measured: {name} -->", f"<!-- end: {name} -->"
    before, rest = docs.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    docs.write_text(f"{before}{begin}\n{tables}\n{end}{after}", encoding="utf-8")


def names(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", type=names, default=list(TOOLS), help=", ".join(TOOLS))
    parser.add_argument(
        "--method", default="", help="only methods whose name contains this, with all seeds"
    )
    parser.add_argument("--bits", type=numbers, default=list(GROUPS), help="2,3,4")
    parser.add_argument("--symmetry", type=names, default=["sym", "asym"], help="sym,asym")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument(
        "--ablation", action="store_true", help="measure roundwise's ingredients one by one"
    )
    parser.add_argument("--tokens", type=int, default=51_200, help="number of held-out tokens")
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-llama")
    parser.add_argument("--text", default="python-stdlib", help="a named text or a file")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of every job")
    parser.add_argument("--redo", action="store_true", help="measure again even if a result exists")
    parser.add_argument(
        "--table", action="store_true", help="only print the tables of existing results"
    )
    parser.add_argument(
        "--docs", type=Path, help="document whose tables for this model are replaced"
    )
    args = parser.parse_args()
    unknown = (set(args.only) - set(TOOLS)) | {str(b) for b in args.bits if b not in GROUPS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as scratch:
        calibration, held_out = split_source(args.text, Path(scratch))
        evaluator = Evaluator(args.model, calibration, held_out, args.tokens)
        results = Results(args.cache / "results.jsonl")
        if not args.table:
            syms = [{"sym": True, "asym": False}[name] for name in args.symmetry]
            formats = [(bits, GROUPS[bits], sym) for bits in args.bits for sym in syms]
            more = ABLATION if args.ablation else {}
            selected = list(jobs(args.only, formats, args.seeds, more, args.method))
            logs = results.file.parent / "logs"
            measure(selected, evaluator, results, logs, args.threads, args.redo)
    records = results.of(evaluator.identity())
    tables, ingredient_table = report(records), ingredients(records)
    print(f"{tables}\n\n{ingredient_table}")
    if args.docs:
        insert(tables, args.docs, args.model.name)
        if ingredient_table:
            insert(ingredient_table, args.docs, f"{args.model.name}, ingredients")


if __name__ == "__main__":
    main()
