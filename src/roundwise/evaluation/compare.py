"""An original and what was made of it, side by side: what was lost, and what was won.

Predictions are compared in this process. Speed, loading and memory are measured in a process for each
model, because a process has only one peak.

From figures to a judgement, by rules that are the same for everyone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from roundwise.calibration.overlap import overlap
from roundwise.checkpoint.gptq_format import parse_dynamic_rules, read_quantization_config
from roundwise.checkpoint.hub import local_folder
from roundwise.checkpoint.manifest import read_manifest
from roundwise.checkpoint.reader import Checkpoint
from roundwise.config import QuantizeConfig
from roundwise.errors import CalibrationError, CheckpointError, RunError
from roundwise.evaluation.divergence import divergence
from roundwise.evaluation.perplexity import perplexity
from roundwise.evaluation.tasks import evaluate_tasks
from roundwise.inference.load import load
from roundwise.run.api import quantize

#: Metrics of lm-eval that are parts of a whole, 1 being best; the first that a task has is its score.
SCORES = ("acc_norm", "acc", "exact_match", "f1", "mc2", "pass@1")
#: Mean relative loss in percent, up to which a result is safe, and acceptable.
SAFE, ACCEPTABLE = 1.0, 2.0
#: Points that a single task may lose, and perplexity may rise, before it is pointed out.
TASK_POINTS, PERPLEXITY_RISE = 2.0, 1.5


@dataclass(frozen=True)
class TaskChange:
    """One task before and after."""

    task: str
    metric: str
    base: float
    quantized: float

    @property
    def points(self) -> float:
        """Hundredths of the score won (or, negative, lost)."""
        return 100 * (self.quantized - self.base)

    @property
    def flagged(self) -> bool:
        """It lost more than TASK_POINTS."""
        return self.points < -TASK_POINTS


def task_changes(
    base: dict[str, dict[str, float]], quantized: dict[str, dict[str, float]]
) -> list[TaskChange]:
    """Every task that has a score, before and after; others (perplexities) have no points."""
    found = []
    for task, metrics in base.items():
        metric = next((name for name in SCORES if name in metrics), None)
        if metric is not None:
            found.append(TaskChange(task, metric, metrics[metric], quantized[task][metric]))
    return found


def degradation(perplexity: tuple[float, float] | None, tasks: list[TaskChange]) -> float:
    """Percent lost: of the mean task score where there are tasks, else by how much perplexity rose."""
    scored = [change for change in tasks if change.base > 0]
    if scored:
        return 100 * (1 - fmean(c.quantized for c in scored) / fmean(c.base for c in scored))
    assert perplexity is not None, "a comparison has a text or tasks"
    return 100 * (perplexity[1] / perplexity[0] - 1)


def verdict(perplexity: tuple[float, float] | None, tasks: list[TaskChange]) -> str:
    """safe, acceptable, investigate, or failed."""
    if perplexity is not None and perplexity[1] - perplexity[0] > PERPLEXITY_RISE:
        return "failed"
    lost = degradation(perplexity, tasks)
    return "safe" if lost < SAFE else "acceptable" if lost <= ACCEPTABLE else "investigate"


#: Parts of a window in which divergence is told apart: does it grow with the context?
PARTS = 8
#: Part of the evaluation text that may be in the calibration text without a word.
CONTAMINATED = 0.01
#: What is taken over from `roundwise bench`.
SPEED = (
    "prompt_tokens_per_second", "generation_tokens_per_second", "peak_rss_bytes", "load_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """How models are compared."""

    ids: list[int]
    """Tokens of the text; none: only tasks."""
    window: int = 2048
    stride: int = 512
    batch_size: int = 4
    tasks: list[str] = field(default_factory=list)
    include_path: Path | None = None
    shots: int | None = None
    limit: int | None = None
    speed: bool = True
    dtype: torch.dtype | str = "auto"
    device: str = "cpu"


@dataclass
class Compared:
    """A quantized model beside its original."""

    name: str
    perplexity: tuple[float, float] | None
    """Original's and its own, in sliding windows."""
    kl_divergence: float | None
    top1_agreement: float | None
    kl_by_position: list[tuple[int, float]]
    """First position of a part of the window, and the mean KL there."""
    bytes: tuple[int, int]
    tasks: list[TaskChange]
    speed: tuple[dict[str, float], dict[str, float]] | None
    warnings: list[str]

    @property
    def verdict(self) -> str:
        """safe, acceptable, investigate, or failed."""
        return verdict(self.perplexity, self.tasks)

    def as_dict(self) -> dict[str, Any]:
        """As `compare --json` prints it."""
        return {
            "name": self.name,
            "perplexity": _pair(self.perplexity),
            "kl_divergence": self.kl_divergence,
            "top1_agreement": self.top1_agreement,
            "kl_by_position": [{"from": at, "kl_divergence": kl} for at, kl in self.kl_by_position],
            "bytes": _pair(self.bytes),
            "tasks": [
                asdict(change) | {"points": change.points, "flagged": change.flagged}
                for change in self.tasks
            ],
            "speed": _pair(self.speed),
            "degradation_percent": degradation(self.perplexity, self.tasks),
            "verdict": self.verdict,
            "warnings": self.warnings,
        }


def compare(
    base: str | os.PathLike[str],
    quantized: list[str | os.PathLike[str]],
    protocol: Protocol,
    *,
    progress: Callable[[str, float], None] = lambda _what, _done: None,
) -> list[Compared]:
    """Compares quantized models with the original they were made from.

    Args:
        base: folder or hub id of the original.
        quantized: folders or hub ids.
        protocol: what is measured, and on what.
        progress: called with what is done and the finished part of it, 0 … 1.

    Raises:
        CalibrationError: the text is too short.
        CheckpointError: a model cannot be opened, or has another vocabulary.
        NumericalError: the output of a model is NaN or infinite.
    """
    if not protocol.ids and not protocol.tasks:
        raise CalibrationError("nothing to compare on: give a text, tasks, or both")
    original = _open(base, protocol)
    vocabulary = original[0].config.get_text_config().vocab_size
    own = _own(base, original, protocol, progress)
    found = []
    for model in quantized:
        opened = _open(model, protocol)
        if opened[0].config.get_text_config().vocab_size != vocabulary:
            raise CheckpointError(f"{model} has another vocabulary than {base}")
        theirs = _own(model, opened, protocol, progress)
        both = None
        if protocol.ids:
            both = divergence(
                original[0], opened[0], protocol.ids,
                window=min(protocol.window, len(protocol.ids)), batch_size=protocol.batch_size,
                progress=partial(progress, f"divergence of {model}"),
            )  # fmt: skip
        found.append(
            Compared(
                name=Path(model).name,
                perplexity=(own.perplexity, theirs.perplexity) if protocol.ids else None,
                kl_divergence=both.kl_divergence if both else None,
                top1_agreement=both.top1_agreement if both else None,
                kl_by_position=by_part(both.kl_by_position) if both else [],
                bytes=(own.bytes, theirs.bytes),
                tasks=task_changes(own.tasks, theirs.tasks),
                speed=(own.speed, theirs.speed) if own.speed and theirs.speed else None,
                warnings=_contamination(model, protocol.ids),
            )
        )
    return found


@dataclass
class _Own:
    """What is measured of one model by itself."""

    bytes: int
    perplexity: float = float("nan")
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    speed: dict[str, float] | None = None


def _open(model: str | os.PathLike[str], protocol: Protocol) -> tuple[Any, Any]:
    loaded, tokenizer = load(model, dtype=protocol.dtype, device=protocol.device)
    if protocol.tasks and tokenizer is None:
        raise CheckpointError(f"{model} has no tokenizer, which tasks need")
    return loaded, tokenizer


def _own(
    name: str | os.PathLike[str],
    opened: tuple[Any, Any],
    protocol: Protocol,
    progress: Callable[[str, float], None],
) -> _Own:
    model, tokenizer = opened
    folder = local_folder(name)
    own = _Own(sum(info.nbytes for info in Checkpoint(folder).tensors.values()))
    if protocol.ids:
        own.perplexity = perplexity(
            model, tokenizer, protocol.ids, window=protocol.window, stride=protocol.stride,
            batch_size=protocol.batch_size,
            progress=partial(progress, f"perplexity of {name}"),
        ).perplexity  # fmt: skip
    if protocol.tasks:
        own.tasks = evaluate_tasks(
            model, tokenizer, protocol.tasks, include_path=protocol.include_path,
            shots=protocol.shots, limit=protocol.limit, batch_size=protocol.batch_size,
        ).scores  # fmt: skip
    if protocol.speed:
        progress(f"speed of {name}", 0.0)
        own.speed = _speed(folder, model, protocol)
    return own


def _speed(folder: Path, model: Any, protocol: Protocol) -> dict[str, float]:
    """`roundwise bench` in a process of its own; shorter where the model's context is."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    generated = min(32, limit // 4)
    dtype = str(protocol.dtype).removeprefix("torch.")
    done = subprocess.run(  # noqa: S603  # ourselves
        [
            sys.executable, "-m", "roundwise", "bench", str(folder), "--json", "--dtype", dtype,
            "--device", protocol.device, "--generated-tokens", str(generated),
            "--prompt-tokens", str(min(256, limit - generated)),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"the speed of {folder} cannot be measured: {reason}")
    result = json.loads(done.stdout)
    return {name: result[name] for name in SPEED}


def by_part(values: list[float]) -> list[tuple[int, float]]:
    """The window in PARTS parts: where each begins, and its mean."""
    edges = sorted({len(values) * i // PARTS for i in range(PARTS + 1)})
    return [(a, sum(values[a:b]) / (b - a)) for a, b in pairwise(edges)]


def _contamination(model: str | os.PathLike[str], ids: list[int]) -> list[str]:
    """Says so when the text was, in part, calibrated with; known only of our own checkpoints."""
    manifest = read_manifest(local_folder(model))
    calibration = manifest.run.calibration if manifest is not None else None
    shared = overlap(calibration.sketch, ids) if calibration is not None else 0.0
    if shared <= CONTAMINATED:
        return []
    return [
        f"{shared:.0%} of the evaluation text was calibrated with: take other text, this flatters "
        "the quantized model"
    ]


def round_to_nearest_like(
    base: str | os.PathLike[str], like: str | os.PathLike[str], out: Path
) -> None:
    """Writes the original, rounded to nearest with the settings of `like`, to the folder `out`.

    Raises:
        ConfigError: these settings are not ours to write.
    """
    settings = read_quantization_config(Checkpoint(local_folder(like)))
    names = ("bits", "group_size", "sym")
    config = QuantizeConfig(
        method="rtn",
        dynamic=parse_dynamic_rules(settings),
        **{name: settings[name] for name in names},
    )
    quantize(base, out, config)


def _pair(values: tuple[Any, Any] | None) -> dict[str, Any] | None:
    return None if values is None else {"base": values[0], "quantized": values[1]}
