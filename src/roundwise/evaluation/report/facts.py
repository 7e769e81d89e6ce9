"""Reads the facts of a report from the files of a finished checkpoint.

Nothing here needs the model: what is measured with it comes from outside (measure.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import log10
from pathlib import Path
from statistics import median

from roundwise.checkpoint.manifest import (
    LayerRecord,
    Manifest,
    RunRecord,
    read_manifest,
    read_run,
    widths,
)
from roundwise.checkpoint.quantized_layers import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import CheckpointError
from roundwise.evaluation.reference_prompts import common_length
from roundwise.evaluation.report.advice import SensitiveLayers, override, sensitive_layers
from roundwise.run.strict import layer_issues

#: A layer is an outlier if log10 of its error exceeds the median of its kind by more than OUTLIER_FACTOR
#: standard deviations, and by more than DOUBLED: its error is at least twice as large.
OUTLIER_FACTOR, DOUBLED = 3.5, log10(2)
#: Standard deviation of a normal distribution, divided by its median absolute deviation.
MAD_TO_STD = 1.4826


@dataclass(frozen=True)
class ModelMetrics:
    """Metrics of one model on the evaluation text; divergence is from the original."""

    name: str
    perplexity: float
    kl_divergence: float
    """KL(original || model) per token, in nats."""
    top1_agreement: float
    """Share of tokens, 0 … 1, for which both predict the same token."""
    bytes: int
    """Size of all tensors in the files."""
    kl_by_position: list[tuple[int, float]] = field(default_factory=list)
    """First position of each part of the window, and the mean KL there."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of the original (first) and of the models made from it."""

    text: str
    """Description of the evaluation text."""
    models: list[ModelMetrics]
    verdict: str
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Answers:
    """Answers of the original and the quantized model to a prompt, by greedy decoding."""

    prompt: str
    original: str
    quantized: str

    @property
    def common_length(self) -> int:
        """Number of characters before the first difference."""
        return common_length(self.original, self.quantized)


@dataclass(frozen=True)
class Cell:
    """A cell of the heat map: the layers of one kind in one block."""

    block: str
    """Name of the block, such as model.layers.3."""
    kind: str
    """Name of the layer in the block, such as mlp.down_proj."""
    layers: list[LayerRecord]
    """One layer, or one for each expert."""

    @property
    def worst(self) -> LayerRecord:
        """The layer with the largest error."""
        return max(self.layers, key=lambda layer: layer.relative_error or 0.0)

    @property
    def error(self) -> float | None:
        """The largest relative output error; None: not measured."""
        return self.worst.relative_error

    def values(self, key: str) -> str:
        """Returns the distinct values of a field of its layers, as text."""
        values = sorted({layer[key] for layer in self.layers}, key=lambda v: (v is None, v))
        return ", ".join("-" if value is None else str(value) for value in values)


@dataclass(frozen=True)
class Facts:
    """Contents of the page."""

    name: str
    """Name of the checkpoint's folder."""
    manifest: Manifest
    run: RunRecord | None
    """Time, memory and notes of the run; None: the file was not kept."""
    cells: list[Cell]
    outliers: list[LayerRecord]
    """Layers whose error is an outlier among layers of their kind, the largest first."""
    sizes: dict[str, int]
    """Purpose -> bytes of tensors in the files."""
    issues: list[str]
    """Issues: requests that could not be honoured."""
    evaluation: Evaluation | None = None
    answers: list[Answers] = field(default_factory=list)

    @property
    def model(self) -> str:
        """Name of the original model: the last part of a local path, or the hub id."""
        given = self.manifest.given.model if self.manifest.given else "a model"
        return Path(given).name if Path(given).is_absolute() or given.startswith(".") else given

    @property
    def confirmed_drift(self) -> float | None:
        """Part of the correction for earlier layers that held-out text confirms, median of layers."""
        parts = [layer.confirmed_drift for layer in self.manifest.layers]
        known = [part for part in parts if part is not None]
        return median(known) if known else None

    @property
    def outlier_names(self) -> set[str]:
        """Names of the outliers."""
        return {layer.name for layer in self.outliers}

    @property
    def outlier_override(self) -> str | None:
        """Option that gives the outliers more bits; None: there are none, or they have them."""
        return override(self.outliers, self.manifest.layers)

    @property
    def sensitive(self) -> list[SensitiveLayers]:
        """Losses of the first blocks, and of query and key projections, compared with the others."""
        blocks = [block for block in self.blocks if re.search(r"\.\d+$", block)]
        return sensitive_layers(self.manifest.layers, blocks)

    @property
    def widths(self) -> dict[str, str]:
        """Kind of layer -> bits and group sizes; empty if they are the same for all layers."""
        return widths(self.manifest.layers)

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks, in order."""
        return list(dict.fromkeys(cell.block for cell in self.cells))

    @property
    def kinds(self) -> list[str]:
        """Kinds of layers, in the order of the first block that has them."""
        return list(dict.fromkeys(cell.kind for cell in self.cells))


def read_facts(
    folder: Path, *, evaluation: Evaluation | None = None, answers: list[Answers] | None = None
) -> Facts:
    """Reads the facts of a finished checkpoint from its files.

    Args:
        folder: folder of the checkpoint.
        evaluation, answers: measurements to add (measure.py).

    Raises:
        CheckpointError: roundwise did not make this checkpoint or has not finished it, or it is damaged.
    """
    manifest = read_manifest(folder)
    checkpoint = Checkpoint(folder)
    if manifest is None:
        raise CheckpointError(
            f"{folder} has no roundwise.json: reports need a checkpoint made by roundwise; `roundwise "
            "compare` takes any checkpoint"
        )
    run = read_run(folder)
    cells = make_cells(manifest.layers)
    return Facts(
        name=folder.resolve().name,
        manifest=manifest,
        run=run,
        cells=cells,
        outliers=find_outliers(cells),
        sizes=_sizes_by_purpose(checkpoint),
        issues=[*(run.not_as_asked if run else []), *layer_issues(manifest.layers)],
        evaluation=evaluation,
        answers=answers or [],
    )


def make_cells(layers: list[LayerRecord]) -> list[Cell]:
    """Groups layers by block and kind, such as model.layers.3 and mlp.experts.*.down_proj."""
    groups: dict[tuple[str, str], list[LayerRecord]] = {}
    for layer in layers:
        match = re.match(r"(.*?\.\d+)\.(.+)", layer.name, re.DOTALL)
        block, kind = match.groups() if match else (layer.name, layer.name)
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", kind)
        groups.setdefault((block, kind), []).append(layer)
    return [Cell(block, kind, members) for (block, kind), members in groups.items()]


def find_outliers(cells: list[Cell]) -> list[LayerRecord]:
    """Returns the layers whose relative error is far above the median of their kind, the largest first.

    "Far" is measured in log10 of the error, by the median absolute deviation from the median over all
    layers (see OUTLIER_FACTOR).
    """
    logs: dict[str, list[tuple[float, LayerRecord]]] = {}
    for cell in cells:
        for layer in cell.layers:
            if layer.relative_error:
                logs.setdefault(cell.kind, []).append((log10(layer.relative_error), layer))
    deviations = [
        (value - middle, layer)
        for entries in logs.values()
        for middle in [median(value for value, _ in entries)]
        for value, layer in entries
    ]
    spread = median(abs(value) for value, _ in deviations) if deviations else 0.0
    limit = max(OUTLIER_FACTOR * MAD_TO_STD * spread, DOUBLED)
    outliers = [layer for value, layer in deviations if value > limit]
    return sorted(outliers, key=lambda layer: -(layer.relative_error or 0.0))


def _sizes_by_purpose(checkpoint: Checkpoint) -> dict[str, int]:
    purpose_of = {
        f"{layer.name}.{suffix}": "codes"
        if suffix == layer.layout.codes
        else "scales, zero points, g_idx"
        for layer in quantized_layers(checkpoint)
        for suffix in layer.tensors
    }
    sizes = {"codes": 0, "scales, zero points, g_idx": 0, "embeddings and heads": 0, "other": 0}
    for name, info in checkpoint.tensors.items():
        is_table = len(info.shape) == 2 and re.search(r"emb|wte|head|shared", name)
        purpose = purpose_of.get(name, "embeddings and heads" if is_table else "other")
        sizes[purpose] += info.nbytes
    return sizes
