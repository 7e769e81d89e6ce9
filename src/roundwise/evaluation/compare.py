"""Compares quantized models with their original: accuracy, size, speed, and a verdict.

Accuracy is perplexity, KL divergence, top-1 agreement and tasks of lm-eval, measured in this process.
Speed, loading time and memory are measured in a new process for each model, because the peak memory of
a process cannot be reset. The verdict follows fixed rules (`evaluation.verdict`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from roundwise.calibration.overlap import overlap
from roundwise.calibration.special_tokens import NO_SPECIAL_TOKENS, SpecialTokens
from roundwise.checkpoint.manifest import read_manifest
from roundwise.checkpoint.quantization_config import is_packed, read_quantization_config
from roundwise.checkpoint.quantized_layers import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.config import QuantizeConfig
from roundwise.errors import CalibrationError, CheckpointError, RunError
from roundwise.evaluation.divergence import divergence
from roundwise.evaluation.perplexity import perplexity
from roundwise.evaluation.tasks import evaluate_tasks
from roundwise.evaluation.verdict import (
    TaskChange,
    Verdict,
    advice,
    degradation,
    task_changes,
    verdict,
)
from roundwise.inference.load import load, require_tokenizer
from roundwise.model.build import context_length, text_config
from roundwise.run.api import quantize
from roundwise.system.hub import local_folder

T = TypeVar("T")

#: Parts of a window for which divergence is reported, to show if it grows with the context.
PARTS = 8
#: Share of the evaluation text that may also be in the calibration text without a warning.
CONTAMINATED = 0.01


class Pair(NamedTuple, Generic[T]):
    """A value of the original model and of the quantized one."""

    base: T
    quantized: T


@dataclass(frozen=True)
class Protocol:
    """Evaluation protocol: what is measured, and how."""

    ids: list[int]
    """Token ids of the evaluation text; empty: tasks only."""
    special: SpecialTokens = NO_SPECIAL_TOKENS
    """Special tokens around every window."""
    window: int = 2048
    """Tokens the model sees at once, special ones included."""
    stride: int = 512
    """Tokens from one window to the next, for perplexity."""
    batch_size: int = 4
    """Windows in one forward."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-eval."""
    include_path: Path | None = None
    """Folder with more task files."""
    shots: int | None = None
    """Examples before each question; None: the task's default."""
    limit: int | None = None
    """Number of documents of each task; None: all."""
    speed: bool = True
    """Also measure speed, loading time and memory."""
    dtype: torch.dtype | str = "auto"
    device: str = "cpu"


@dataclass(frozen=True)
class SpeedSummary:
    """Speed, memory and loading time of a model: a part of what `roundwise bench` measures."""

    prompt_tokens_per_second: float
    generation_tokens_per_second: float
    peak_rss_bytes: int
    load_seconds: float


@dataclass(frozen=True)
class Comparison:
    """A quantized model compared with its original."""

    name: str
    """Name of the quantized model's folder."""
    perplexity: Pair[float] | None
    """In sliding windows; None, as the four below: there was no text."""
    kl_divergence: float | None
    """KL(original || quantized) per token, in nats."""
    top1_agreement: float | None
    """Share of tokens for which both models predict the same token."""
    kl_by_position: list[tuple[int, float]]
    """First position of each part of the window, and the mean KL there."""
    bytes: Pair[int]
    """Size of all tensors in the files."""
    tasks: list[TaskChange]
    speed: Pair[SpeedSummary] | None
    warnings: list[str]

    advice: str | None
    """Settings to try next if it lost too much; None: it is not quantized in a format of ours."""

    @property
    def verdict(self) -> Verdict:
        """safe, acceptable, investigate, or failed, and why."""
        return verdict(self.perplexity, self.kl_divergence, self.tasks)

    def as_dict(self) -> dict[str, Any]:
        """Returns the JSON of `compare --json`."""
        speed = self.speed and {k: asdict(v) for k, v in self.speed._asdict().items()}
        return {
            "name": self.name,
            "perplexity": self.perplexity and self.perplexity._asdict(),
            "kl_divergence": self.kl_divergence,
            "top1_agreement": self.top1_agreement,
            "kl_by_position": [
                {"from": start, "kl_divergence": kl} for start, kl in self.kl_by_position
            ],
            "bytes": self.bytes._asdict(),
            "tasks": [
                asdict(change) | {"points": change.points, "flagged": change.flagged}
                for change in self.tasks
            ],
            "speed": speed,
            "degradation_percent": degradation(self.perplexity, self.tasks),
            "verdict": self.verdict.name,
            "reasons": [*self.verdict.reasons],
            "advice": self.advice if self.verdict.lost_too_much else None,
            "warnings": self.warnings,
        }


def compare(
    base: str | os.PathLike[str],
    quantized: Sequence[str | os.PathLike[str]],
    protocol: Protocol,
    *,
    progress: Callable[[str, float], None] = lambda _what, _done: None,
) -> list[Comparison]:
    """Compares quantized models with the original they were made from.

    Args:
        base: folder or hub id of the original.
        quantized: folders or hub ids of the quantized models.
        protocol: what is measured, and how.
        progress: called with the current step and the finished part of it, 0 … 1.

    Raises:
        CalibrationError: the text is too short, or there is neither a text nor a task. CheckpointError:
        a model cannot be loaded, has another vocabulary, or lacks a tokenizer for tasks.
        NumericalError: the output of a model is NaN or infinite. RunError: the speed of a model cannot
        be measured.
    """
    if not protocol.ids and not protocol.tasks:
        raise CalibrationError("nothing to compare on: give a text, tasks, or both")
    original = _load(base, protocol)
    vocabulary = text_config(original.model.config).vocab_size
    base_measurements = _measure(original, protocol, progress)
    comparisons = []
    for name in quantized:
        loaded = _load(name, protocol)
        if text_config(loaded.model.config).vocab_size != vocabulary:
            raise CheckpointError(f"{name} has another vocabulary than {base}")
        comparisons.append(_compare_pair(original, base_measurements, loaded, protocol, progress))
    return comparisons


class _LoadedModel(NamedTuple):
    name: str | os.PathLike[str]
    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class _Measurements:
    """Measurements of one model alone."""

    bytes: int
    perplexity: float | None
    tasks: Mapping[str, Mapping[str, float]]
    speed: SpeedSummary | None


def _load(name: str | os.PathLike[str], protocol: Protocol) -> _LoadedModel:
    model, tokenizer = load(name, dtype=protocol.dtype, device=protocol.device)
    if protocol.tasks:
        require_tokenizer(tokenizer, name)
    return _LoadedModel(name, model, tokenizer)


def _measure(
    loaded: _LoadedModel, protocol: Protocol, progress: Callable[[str, float], None]
) -> _Measurements:
    name, model, tokenizer = loaded
    folder = local_folder(name)
    ppl: float | None = None
    scores: Mapping[str, Mapping[str, float]] = {}
    speed: SpeedSummary | None = None
    if protocol.ids:
        ppl = perplexity(
            model, tokenizer, protocol.ids, special=protocol.special, window=protocol.window,
            stride=protocol.stride, batch_size=protocol.batch_size,
            progress=partial(progress, f"perplexity of {name}"),
        ).perplexity  # fmt: skip
    if protocol.tasks:
        scores = evaluate_tasks(
            model, tokenizer, protocol.tasks, include_path=protocol.include_path,
            shots=protocol.shots, limit=protocol.limit, batch_size=protocol.batch_size,
        ).scores  # fmt: skip
    if protocol.speed:
        progress(f"speed of {name}", 0.0)
        speed = _measure_speed(folder, model, protocol)
    nbytes = sum(info.nbytes for info in Checkpoint(folder).tensors.values())
    return _Measurements(nbytes, ppl, scores, speed)


def _compare_pair(
    original: _LoadedModel,
    base: _Measurements,
    loaded: _LoadedModel,
    protocol: Protocol,
    progress: Callable[[str, float], None],
) -> Comparison:
    own = _measure(loaded, protocol, progress)
    difference = None
    if protocol.ids:
        difference = divergence(
            original.model, loaded.model, protocol.ids, special=protocol.special,
            window=min(protocol.window, len(protocol.ids) + protocol.special.count),
            batch_size=protocol.batch_size,
            progress=partial(progress, f"divergence of {loaded.name}"),
        )  # fmt: skip
    perplexities = None
    if base.perplexity is not None and own.perplexity is not None:
        perplexities = Pair(base.perplexity, own.perplexity)
    return Comparison(
        name=Path(loaded.name).name,
        perplexity=perplexities,
        kl_divergence=difference.kl_divergence if difference else None,
        top1_agreement=difference.top1_agreement if difference else None,
        kl_by_position=means_by_part(difference.kl_by_position) if difference else [],
        bytes=Pair(base.bytes, own.bytes),
        tasks=task_changes(base.tasks, own.tasks),
        speed=Pair(base.speed, own.speed) if base.speed and own.speed else None,
        warnings=_contamination_warnings(loaded.name, protocol.ids),
        advice=_advice(loaded.name),
    )


def _advice(model: str | os.PathLike[str]) -> str | None:
    """Returns what to try next, by the settings of most layers; None: it is in no format of ours."""
    checkpoint = Checkpoint(local_folder(model))
    if not is_packed(checkpoint.tensors):
        return None
    layers = quantized_layers(checkpoint)
    settings = Counter(
        (layer.bits, -1 if layer.groups == 1 else layer.group_size) for layer in layers
    )
    return advice(*settings.most_common(1)[0][0])


def _measure_speed(folder: Path, model: Any, protocol: Protocol) -> SpeedSummary:
    """Runs `roundwise bench` in a new process, with fewer tokens if the model's context is short."""
    limit = context_length(model) or 1 << 20
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
    return SpeedSummary(**{each.name: result[each.name] for each in fields(SpeedSummary)})


def means_by_part(values: Sequence[float]) -> list[tuple[int, float]]:
    """Splits the values of a window's positions into PARTS parts and averages each.

    Args:
        values: one value per position of the window.

    Returns:
        First position and mean of each part; fewer parts if there are fewer values.
    """
    edges = sorted({len(values) * i // PARTS for i in range(PARTS + 1)})
    return [(start, sum(values[start:end]) / (end - start)) for start, end in pairwise(edges)]


def _contamination_warnings(model: str | os.PathLike[str], ids: list[int]) -> list[str]:
    """Returns a warning if the evaluation text was also used for calibration.

    Known only for checkpoints of roundwise: the manifest has a sketch of the calibration text.
    """
    manifest = read_manifest(local_folder(model))
    calibration = manifest.run.calibration if manifest is not None else None
    shared = overlap(calibration.sketch, ids) if calibration is not None else 0.0
    if shared <= CONTAMINATED:
        return []
    return [
        f"{shared:.0%} of the evaluation text was also used for calibration, which flatters the "
        "quantized model: use another text"
    ]


def round_to_nearest_like(
    base: str | os.PathLike[str], like: str | os.PathLike[str], out: Path
) -> None:
    """Quantizes the original by rounding to nearest, with the settings of another checkpoint.

    Args:
        base: folder or hub id of the original.
        like: folder or hub id of the quantized checkpoint whose bits, groups and overrides are used.
        out: folder to write.

    Raises:
        ConfigError: roundwise cannot write these settings.
    """
    settings = read_quantization_config(Checkpoint(local_folder(like)))
    stated = {name: value for name, value in settings.default.known().items() if name != "desc_act"}
    quantize(base, out, QuantizeConfig(method="rtn", dynamic=settings.overrides(), **stated))
