"""Compares generation on the CPU: packed weights, transformers in bfloat16, llama.cpp's Q4_0.

    python benchmarks/generate.py                        ours and transformers in bfloat16
    python benchmarks/generate.py --llamacpp PYTHON      llama.cpp too: an interpreter that has
                                                         llama-cpp-python and gguf
    python benchmarks/generate.py --work DIR             keep the models (4 GB) for the next run

A Llama of 1.28 billion random parameters, 4 bit, groups of 128; one sequence, greedy. Each program runs
in a separate process that stays loaded; measurements alternate: A B C A B C. Ratios are medians over the
rounds. Peak memory is that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory import SHAPES, VOCABULARY, write_model
from peers.environments import python_of

import roundwise as rw

PEERS = Path(__file__).parent / "peers"
SHAPE = SHAPES["1.2b"]


class GenerationProcess:
    """A process that generates text each time `run` is called."""

    def __init__(self, command: list[Any]) -> None:
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def run(self) -> dict[str, float]:
        """Returns one measurement."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args} failed with exit code {self.process.wait()}")
        result: dict[str, float] = json.loads(line)
        return result

    def close(self) -> None:
        """Ends the process and waits for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def models(work: Path) -> tuple[Path, Path]:
    """Returns the folders of the model in bfloat16 and in 4 bits, and writes the models if missing."""
    dense, packed = work / "dense", work / "packed"
    if not (dense / "model.safetensors.index.json").exists():
        dense.mkdir(parents=True, exist_ok=True)
        write_model(dense, **SHAPE)
    if not (packed / "config.json").exists():
        windows = [[token % VOCABULARY for token in range(1, 33)]]
        rw.quantize(dense, packed, rw.QuantizeConfig(method="rtn"), windows, samples=1, seq_len=32)
    return dense, packed


def start_processes(
    work: Path, prompt: int, new: int, llamacpp: str | None
) -> dict[str, GenerationProcess]:
    """Starts one process for each program, ours first."""
    dense, packed = models(work)
    python, script = python_of("roundwise"), PEERS / "run_generate.py"
    processes = {
        "roundwise 4 bit": GenerationProcess([python, script, packed, prompt, new]),
        "transformers bfloat16": GenerationProcess([python, script, dense, prompt, new]),
    }
    if llamacpp:
        shape = work / "shape.json"
        shape.write_text(json.dumps({**SHAPE, "vocabulary": VOCABULARY}))
        threads = subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.get_num_threads())"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        processes["llama.cpp Q4_0"] = GenerationProcess(
            [llamacpp, PEERS / "run_llamacpp.py", shape, work / "q4_0.gguf", prompt, new, threads]
        )
    return processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llamacpp", metavar="PYTHON")
    parser.add_argument("--work", type=Path)
    parser.add_argument(
        "--prompt", type=int, nargs="+", default=[16, 512], help="number of prompt tokens"
    )
    parser.add_argument("--new", type=int, default=64, help="number of tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for prompt in args.prompt:
            work = args.work or Path(scratch)
            processes = start_processes(work, prompt, args.new, args.llamacpp)
            print_table(processes, args, prompt)


def print_table(
    processes: dict[str, GenerationProcess], args: argparse.Namespace, prompt: int
) -> None:
    """Measures all processes alternately and prints the table."""
    for process in processes.values():
        process.run()  # warm-up
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    for _ in range(args.rounds):
        for name, process in processes.items():
            runs[name].append(process.run())
    for process in processes.values():
        process.close()
    ours = runs["roundwise 4 bit"]
    print(f"\nPrompt of {prompt} tokens, then {args.new} more:\n")
    print(
        "| | prompt tokens/s | generated tokens/s | peak MB | ours: prompt | generation | memory |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, results in runs.items():
        middle = {
            key: statistics.median(r[key] for r in results) for key in ours[0] if key in results[0]
        }
        ratio = {
            key: statistics.median(o[key] / r[key] for o, r in zip(ours, results, strict=True))
            for key in ("prompt", "generation", "peak")
        }
        print(
            f"| {name} | {middle['prompt']:.0f} | {middle['generation']:.1f} | "
            f"{middle['peak'] / 1e6:.0f} | "
            + " | ".join(f"{value:.2f}" for value in ratio.values())
            + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
