"""Measures what quantization loses in tasks that a person can check, on real models, through lm-eval.

    python benchmarks/tasks.py --models smollm2-135m                     4, 3, 2 bits and the original
    python benchmarks/tasks.py --models smollm2-135m --checkpoints OUT   checkpoints made elsewhere
    python benchmarks/tasks.py --models smollm2-135m --limit 20          a quick look

The tasks are written by peers/task_files.py: the last word of a passage, the true continuation, JSON and
answers of a given form (with the chat template, where the model has one), and code that runs. Generated
code is run in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from accuracy import names, numbers
from peers.prose import write_prose
from peers.published import MODELS, dense_checkpoint
from peers.task_files import CHAT_TASKS, TASKS, write_tasks

import roundwise as rw

Scores = dict[str, float]


def measure(folder: Path, tasks: Path, limit: int | None) -> Scores:
    """Returns the scores of a model: "task metric" -> value.

    Args:
        folder: the model.
        tasks: folder with the task files.
        limit: questions of each task; None: all.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = rw.load(folder, dtype=torch.bfloat16)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    scores: Scores = {}
    for chat in (False, True):
        chosen = [task for task in TASKS if (task in CHAT_TASKS) == chat]
        if chat and not tokenizer.chat_template:
            continue
        with redirect_stdout(sys.stderr):
            found = lm_eval.simple_evaluate(
                model=harness, tasks=chosen, task_manager=manager, limit=limit,
                apply_chat_template=chat, bootstrap_iters=0,
            )  # fmt: skip
        for task, metrics in found["results"].items():
            for metric, value in metrics.items():
                name = metric.partition(",")[0]
                if isinstance(value, float) and not name.endswith("_stderr"):
                    scores[f"{task} {name}"] = value
    return scores


def table(scores: dict[str, Scores]) -> str:
    """Returns a markdown table: one row per model, one column per metric."""
    columns = list(next(iter(scores.values())))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, values in scores.items():
        lines.append(f"| {name} | {' | '.join(f'{values[c]:.3f}' for c in columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=names, default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--bits", type=numbers, default=[4, 3, 2], help="4,3,2")
    parser.add_argument("--recipes", type=names, default=["textbook", "best"])
    parser.add_argument("--checkpoints", type=Path, nargs="*", help="instead of our own")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--json", type=Path, help="file for the scores")
    args = parser.parse_args()
    everything: dict[str, dict[str, Scores]] = {}
    for name in args.models:
        with tempfile.TemporaryDirectory() as scratch_name:
            scratch = Path(scratch_name)
            calibration, held_out = write_prose(scratch)
            tasks = scratch / "tasks"
            tasks.mkdir()
            write_tasks(tasks, held_out.read_text(encoding="utf-8"))
            original = dense_checkpoint(name)
            scores = {"original": measure(original, tasks, args.limit)}
            for label, folder in _checkpoints(args, original, calibration, scratch):
                scores[label] = measure(folder, tasks, args.limit)
        everything[name] = scores
        print(f"{MODELS[name].title}\n\n{table(scores)}\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(everything, indent=2) + "\n")


def _checkpoints(args: argparse.Namespace, original: Path, calibration: Path, scratch: Path) -> Any:
    """Yields a label and a folder: those that were given, or ours at all widths."""
    if args.checkpoints:
        yield from ((folder.name, folder) for folder in args.checkpoints)
        return
    for bits in args.bits:
        for recipe in args.recipes:
            out = scratch / f"{recipe}-{bits}"
            config = rw.QuantizeConfig(bits=bits, recipe=recipe)
            rw.quantize(original, out, config, str(calibration), samples=args.samples, seq_len=512)
            yield f"{recipe}, {bits} bit", out


if __name__ == "__main__":
    main()
