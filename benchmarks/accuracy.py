"""What quantization costs: roundwise, each of its ingredients, and its peers, before one judge.

    python benchmarks/accuracy.py                          everything; hours on two cores
    python benchmarks/accuracy.py --only roundwise         rtn, textbook and best, three seeds
    python benchmarks/accuracy.py --only roundwise --ablation --seeds 0
    python benchmarks/accuracy.py --only gptqmodel --bits 3 --seeds 0 --method default
    python benchmarks/accuracy.py --table --docs docs/accuracy.md    what is already measured
    python benchmarks/accuracy.py --model DIR --text FILE  another model, on a text of its own

Each job is a process of its own; its CPU time and peak memory (VmHWM) are its own. All tools get the
same calibration windows as token ids; their checkpoints are decoded by one reader (peers/reader.py)
and judged by one evaluator in float32, on held-out tokens. Each peer lives in an environment of its
own under .venv-peers, made on first use (a gigabyte each). Results are kept as JSON lines and not
measured again; `--redo` measures again. A failure is kept as well: a refusal is a result.

A text FILE is cut in two: the first nine tenths are for calibration, the last tenth is held out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.environments import HERE, ROOT, python_of
from peers.evaluator import Evaluator
from peers.methods import GROUPS, TOOLS, Job, jobs
from peers.table import ingredients, report
from peers.texts import parts

TIMEOUT = 3 * 3600


class Results:
    """Measured jobs, as JSON lines in a file; one process at a time writes."""

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
        """Appends a record, and from now on it is the one for its key."""
        self.records[self._name(record["key"])] = record
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(json.dumps(record) + "\n")

    def of(self, identity: dict[str, Any]) -> list[dict[str, Any]]:
        """Records of one model, text and held-out part."""
        records = self.records.values()
        return [r for r in records if all(r["key"][k] == v for k, v in identity.items())]


def key_of(job: Job, identity: dict[str, Any]) -> dict[str, Any]:
    """What a result depends on; the seed of a method without calibration is always the first."""
    return {
        **identity, "tool": job.tool, "method": job.method, "bits": job.bits, "sym": job.sym,
        "seed": job.seed, "settings": job.settings,
    }  # fmt: skip


def run(job: Job, evaluator: Evaluator, threads: int, logs: Path) -> dict[str, Any]:
    """Runs one job in a process of its own and judges what it wrote."""
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        out, answer = scratch / "checkpoint", scratch / "result.json"
        order = {
            "model": str(evaluator.model.resolve()), "out": str(out), "settings": job.settings,
            "windows": evaluator.windows(job.seed),
        }  # fmt: skip
        (scratch / "job.json").write_text(json.dumps(order))
        logs.mkdir(parents=True, exist_ok=True)
        name = f"{job.tool}-{job.method}-{job.bits}-{'sym' if job.sym else 'asym'}-{job.seed}.log"
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
        found = json.loads(answer.read_text())
        if "error" not in found:
            checkpoints = sorted(file.parent for file in out.rglob("config.json"))
            found |= evaluator.judge(checkpoints[0])
        return found


def measure(args: argparse.Namespace, evaluator: Evaluator, results: Results) -> None:
    """All selected jobs that have no result yet."""
    identity = evaluator.identity()
    syms = [{"sym": True, "asym": False}[name] for name in args.symmetry]
    selected = list(jobs(args.only, args.bits, syms, args.seeds, args.ablation, args.method))
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {args.threads} threads"
    for number, job in enumerate(selected, start=1):
        key = key_of(job, identity)
        if key in results and not args.redo:
            continue
        begun = time.strftime("%H:%M:%S")
        found = run(job, evaluator, args.threads, results.file.parent / "logs")
        results.add({"key": key, "threads": args.threads, "machine": machine, **found})
        said = found.get("error") or f"KL {found['kl']:.5f}, {found['cpu_seconds']:.0f} s"
        print(
            f"{begun} [{number}/{len(selected)}] {job.row}, {job.bits} bit, "
            f"{'sym' if job.sym else 'asym'}, seed {job.seed}: {said}",
            flush=True,
        )


def insert(tables: str, docs: Path, name: str) -> None:
    """Puts tables between the two marks of their name in a document."""
    begin, end = f"<!-- measured: {name} -->", f"<!-- end: {name} -->"
    head, rest = docs.read_text(encoding="utf-8").split(begin)
    tail = rest.split(end)[1]
    docs.write_text(f"{head}{begin}\n{tables}\n{end}{tail}", encoding="utf-8")


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
        "--method", default="", help="only methods with this in their name, all seeds"
    )
    parser.add_argument("--bits", type=numbers, default=list(GROUPS), help="2,3,4")
    parser.add_argument("--symmetry", type=names, default=["sym", "asym"], help="sym,asym")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument(
        "--ablation", action="store_true", help="roundwise's ingredients one by one"
    )
    parser.add_argument("--tokens", type=int, default=51_200, help="held-out tokens")
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-llama")
    parser.add_argument("--text", default="python-stdlib", help="a named text, or a file")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of every job")
    parser.add_argument("--redo", action="store_true", help="measure again what was measured")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the tables")
    parser.add_argument(
        "--docs", type=Path, help="a document whose tables of this model are renewed"
    )
    args = parser.parse_args()
    unknown = (set(args.only) - set(TOOLS)) | {str(b) for b in args.bits if b not in GROUPS}
    if unknown:
        parser.error(f"not known: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as scratch:
        calibration, held_out = parts(args.text, Path(scratch))
        evaluator = Evaluator(args.model, calibration, held_out, args.tokens)
        results = Results(args.cache / "results.jsonl")
        if not args.table:
            measure(args, evaluator, results)
    records = results.of(evaluator.identity())
    tables, single = report(records), ingredients(records)
    print(f"{tables}\n\n{single}")
    if args.docs:
        insert(tables, args.docs, args.model.name)
        if single:
            insert(single, args.docs, f"{args.model.name}, ingredients")


if __name__ == "__main__":
    main()
