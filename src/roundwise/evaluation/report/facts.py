"""What there is to say about a finished checkpoint, read off its files.

Nothing is computed here that needs the model; what was measured with it comes in from outside.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import log, log10
from pathlib import Path
from statistics import median

from roundwise.checkpoint.gptq_format import SUFFIXES
from roundwise.checkpoint.manifest import (
    CurvePoint,
    LayerRecord,
    Manifest,
    RunRecord,
    read_manifest,
    read_run,
)
from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import CheckpointError
from roundwise.run.block_solver import widths
from roundwise.run.strict import layer_issues

#: A layer stands out when its error, in decades from the median of its kind, is more than so many times
#: the usual deviation (1.4826 of the median one, as for a normal distribution), and the error doubled.
OUTLYING, USUAL, DOUBLED = 3.5, 1.4826, log10(2)


@dataclass(frozen=True)
class Measured:
    """One model on the evaluation text."""

    name: str
    perplexity: float
    kl_divergence: float
    top1_agreement: float
    bytes: int
    kl_by_position: list[tuple[int, float]] = field(default_factory=list)
    """First position of a part of the window, and the mean KL there."""


@dataclass(frozen=True)
class Evaluation:
    """The original first, then what was made of it."""

    text: str
    """What was read, and how."""
    models: list[Measured]
    verdict: str
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Answers:
    """How the original and the quantized model go on from a prompt, taking the likeliest token."""

    prompt: str
    original: str
    quantized: str

    @property
    def agreed(self) -> int:
        """Characters until they part."""
        pairs = zip(self.original, self.quantized, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        return min(len(self.original), len(self.quantized)) if same is None else same


@dataclass(frozen=True)
class Cell:
    """The layers of one kind in one block: one, or one for each expert."""

    block: str
    kind: str
    layers: list[LayerRecord]

    @property
    def worst(self) -> LayerRecord:
        """The layer with the largest error."""
        return max(self.layers, key=lambda layer: layer.relative_error or 0.0)

    @property
    def error(self) -> float | None:
        """The largest relative output error; None: none is known."""
        return self.worst.relative_error

    def values(self, key: str) -> str:
        """What its layers have of something, each once."""
        found = sorted({layer[key] for layer in self.layers}, key=lambda v: (v is None, v))
        return ", ".join("-" if value is None else str(value) for value in found)


@dataclass(frozen=True)
class Facts:
    """Everything on the page."""

    name: str
    manifest: Manifest
    run: RunRecord | None
    """Time, memory and notes; None: not kept."""
    cells: list[Cell]
    outliers: list[LayerRecord]
    """Layers whose error stands out among its kind, the largest first."""
    sizes: dict[str, int]
    """Bytes in the files by what they are for."""
    not_as_asked: list[str]
    evaluation: Evaluation | None = None
    answers: list[Answers] = field(default_factory=list)

    @property
    def model(self) -> str:
        """What was quantized: the name of a folder, without the way there, or of a hub's model."""
        given = self.manifest.given.model if self.manifest.given else "a model"
        return Path(given).name if Path(given).is_absolute() or given.startswith(".") else given

    @property
    def more_text(self) -> float | None:
        """By which part twice the calibration text would lower the error, as far as was seen."""
        watched = [b.saturation for b in self.manifest.blocks if b.saturation]
        found = [part for each in watched if (part := gain(each.points)) is not None]
        return median(found) if found else None

    @property
    def standing_out(self) -> set[str]:
        """Names of the outliers."""
        return {layer.name for layer in self.outliers}

    @property
    def widths(self) -> dict[str, str]:
        """Bits and group sizes of each kind of layer, where they are not the same for all."""
        return widths(self.manifest.layers)

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks, in their order."""
        return list(dict.fromkeys(cell.block for cell in self.cells))

    @property
    def kinds(self) -> list[str]:
        """Kinds of layers, in the order of the first block that has them."""
        return list(dict.fromkeys(cell.kind for cell in self.cells))


def read_facts(
    folder: Path, *, evaluation: Evaluation | None = None, answers: list[Answers] | None = None
) -> Facts:
    """What the files of a finished checkpoint tell.

    Args:
        folder: of the checkpoint.
        evaluation, answers: what was measured with it.

    Raises:
        CheckpointError: it is not one that roundwise finished, or it is damaged.
    """
    manifest = read_manifest(folder)
    checkpoint = Checkpoint(folder)
    if manifest is None:
        raise CheckpointError(
            f"{folder} has no roundwise.json: a report is about a run of roundwise; `roundwise compare` "
            "takes any checkpoint"
        )
    run = read_run(folder)
    cells = cells_of(manifest.layers)
    return Facts(
        name=folder.resolve().name,
        manifest=manifest,
        run=run,
        cells=cells,
        outliers=outliers_of(cells),
        sizes=_sizes(checkpoint),
        not_as_asked=[*(run.not_as_asked if run else []), *layer_issues(manifest.layers)],
        evaluation=evaluation,
        answers=answers or [],
    )


def cells_of(layers: list[LayerRecord]) -> list[Cell]:
    """Layers by block and kind: model.layers.3 and mlp.experts.*.down_proj."""
    found: dict[tuple[str, str], list[LayerRecord]] = {}
    for layer in layers:
        parts = re.match(r"(.*?\.\d+)\.(.+)", layer.name, re.DOTALL)
        block, kind = parts.groups() if parts else (layer.name, layer.name)
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", kind)
        found.setdefault((block, kind), []).append(layer)
    return [Cell(block, kind, each) for (block, kind), each in found.items()]


def outliers_of(cells: list[Cell]) -> list[LayerRecord]:
    """Layers whose relative error is far above what is usual for their kind."""
    logs: dict[str, list[tuple[float, LayerRecord]]] = {}
    for cell in cells:
        for layer in cell.layers:
            if layer.relative_error:
                logs.setdefault(cell.kind, []).append((log10(layer.relative_error), layer))
    above = [
        (value - middle, layer)
        for each in logs.values()
        for middle in [median(value for value, _ in each)]
        for value, layer in each
    ]
    usual = median(abs(value) for value, _ in above) if above else 0.0
    limit = max(OUTLYING * USUAL * usual, DOUBLED)
    found = [layer for value, layer in above if value > limit]
    return sorted(found, key=lambda layer: -(layer.relative_error or 0.0))


def gain(points: list[CurvePoint]) -> float | None:
    """By which part the error fell with the last doubling of tokens, told from the last two points."""
    if len(points) < 2:
        return None
    before, after = points[-2:]
    if not before.relative_error or after.tokens <= before.tokens:
        return None
    fell = after.relative_error / before.relative_error
    return float(1 - fell ** (log(2) / log(after.tokens / before.tokens)))


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    stems = {
        name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight")
    }
    found = {"codes": 0, "scales, zeros, order": 0, "embeddings and heads": 0, "all other": 0}
    for name, info in checkpoint.tensors.items():
        stem, _, suffix = name.rpartition(".")
        if stem in stems and suffix in SUFFIXES:
            kind = "codes" if suffix == "qweight" else "scales, zeros, order"
        else:
            large = len(info.shape) == 2 and re.search(r"emb|wte|head|shared", name)
            kind = "embeddings and heads" if large else "all other"
        found[kind] += info.nbytes
    return found
