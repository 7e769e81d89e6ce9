"""Writes the model card of a checkpoint, README.md, from its manifest and what was measured.

The part between two comments is ours and is replaced when the card is written again. All else is kept:
the original's card below it, with its licence and its other metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from roundwise.checkpoint.engines import ENGINES
from roundwise.checkpoint.manifest import Manifest, read_manifest
from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.writer import atomic_write
from roundwise.errors import CheckpointError
from roundwise.publish.measurement import Measurement
from roundwise.system.memory import format_size

CARD = "README.md"
#: Comments around our part of a card.
BEGIN, END = "<!-- written by roundwise -->", "<!-- end of what roundwise wrote -->"
#: Heading of the part of ours that says what was measured.
ACCURACY = "## Accuracy"
#: Metadata of the original that do not hold for a quantized model.
NOT_KEPT = ("base_model", "base_model_relation", "model-index", "eval_results", "model_name")
#: Tags that say how a model is quantized.
QUANTIZATION_TAG = re.compile(r"[2-8]-bit|gptq|compressed-tensors|roundwise")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: Ending of a model class -> task of the hub.
PIPELINE_TAGS = {
    "ForCausalLM": "text-generation", "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask", "ForSequenceClassification": "text-classification",
    "Model": "feature-extraction",
}  # fmt: skip


def write_card(
    folder: Path,
    manifest: Manifest,
    config: Mapping[str, Any],
    *,
    source: Path | None = None,
    base_model: str | None = None,
    name: str | None = None,
    measurement: Measurement | None = None,
) -> Path:
    """Writes the model card of a checkpoint.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        config: its config.json.
        source: folder of the original, whose card is kept below ours; None: what is in `folder` is
            kept, and so is an earlier measurement.
        base_model: hub id of the original; None: the one in the card that is kept, if it has one.
        name: name of the model in the card, such as its hub id; None: made of the original's.
        measurement: accuracy to state; None: none, or the earlier one.

    Returns:
        The file.

    Raises:
        StorageError: the disk is full or failed.
    """
    before = _read_card((source or folder) / CARD)
    if source is None:
        base_model = base_model or before.metadata.get("base_model")
    name = name or _default_name(manifest)
    data = _metadata(before.metadata, manifest, config, base_model)
    accuracy, results = "", list[EvalResult]()
    if measurement is not None:
        accuracy = _table((f"on {measurement.text}", "original", "this model"), measurement.rows())
        results = [*measurement.results()]
    elif source is None:
        accuracy, results = before.accuracy(), before.results()
    if results:
        data.model_name, data.eval_results = name, results
    own = "\n\n".join(_sections(name, base_model, manifest, config, accuracy))
    path = folder / CARD
    with atomic_write(path) as file:
        file.write(f"---\n{data.to_yaml()}\n---\n{BEGIN}\n{own}\n{END}\n{before.text}".encode())
    return path


def rewrite_card(
    folder: Path,
    *,
    base_model: str | None = None,
    name: str | None = None,
    measurement: Measurement | None = None,
) -> Path:
    """Writes the card of a finished checkpoint again; arguments and result as for `write_card`.

    Raises:
        CheckpointError: roundwise did not make the checkpoint, or its manifest is damaged.
        StorageError: the disk is full or failed.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(
            f"{folder} has no roundwise.json: cards are written for checkpoints made by roundwise"
        )
    return write_card(
        folder, manifest, Checkpoint(folder).config, base_model=base_model, name=name,
        measurement=measurement,
    )  # fmt: skip


@dataclass(frozen=True)
class _Card:
    """A card as it was."""

    metadata: Mapping[str, Any]
    own: str
    """Our part; empty: there is none."""
    text: str
    """All else."""

    def accuracy(self) -> str:
        """Returns the table of an earlier measurement; empty if there is none."""
        section = self.own.partition(f"{ACCURACY}\n")[2].partition("\n## ")[0]
        return section.strip()

    def results(self) -> list[EvalResult]:
        """Returns the results of an earlier measurement; those of others are not of this model."""
        try:
            index = self.metadata["model-index"] if self.accuracy() else []
            return model_index_to_eval_results(index)[1] if index else []
        except (KeyError, TypeError, ValueError):  # damaged
            return []


def _read_card(file: Path) -> _Card:
    """Reads a card; metadata that are damaged stay text."""
    if not file.is_file():
        return _Card({}, "", "")
    content = file.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
    metadata: Any = None
    match = re.match(r"\s*---\n(.*?)\n---[ \t]*(?:\n|$)", content, re.DOTALL)
    if match:
        try:
            metadata = yaml.safe_load(match[1])
        except (yaml.YAMLError, ValueError, RecursionError):
            metadata = None
    is_parsed = isinstance(metadata, dict)
    text = content[match.end() :] if match and is_parsed else content
    before, _, rest = text.partition(BEGIN)
    own, end, after = rest.partition(END)
    if end:
        text = before + after.lstrip("\n")
    return _Card(metadata if is_parsed else {}, own if end else "", text)


def _metadata(
    kept: Mapping[str, Any], manifest: Manifest, config: Mapping[str, Any], base_model: str | None
) -> ModelCardData:
    """Returns the metadata of the card: the original's, with what is different for this model."""
    tags = kept.get("tags") or []
    tags = [str(tag) for tag in (tags if isinstance(tags, list) else [tags])]
    tags = [tag for tag in tags if not QUANTIZATION_TAG.fullmatch(tag)]
    widths = [f"{bits}-bit" for bits in sorted({layer.bits for layer in manifest.layers})]
    own: dict[str, Any] = {
        "base_model": base_model,
        "base_model_relation": "quantized" if base_model else None,
        "library_name": kept.get("library_name") or "transformers",
        "pipeline_tag": kept.get("pipeline_tag") or _pipeline_tag(config),
        "tags": [*tags, _format(manifest), *widths, "roundwise"],
    }
    rest = {
        key: value
        for key, value in kept.items()
        if isinstance(key, str) and key not in (*NOT_KEPT, *own)
    }
    return ModelCardData(**own, **rest)


def _format(manifest: Manifest) -> str:
    """Returns the format of a checkpoint, whatever its version."""
    is_gptq = str(manifest.run.config.get("format", "gptq")).startswith("gptq")
    return "gptq" if is_gptq else "compressed-tensors"


def _default_name(manifest: Manifest) -> str:
    """Returns a name for a model that does not depend on the folder it is in."""
    original = Path(manifest.given.model).name if manifest.given else "model"
    widths = {layer.bits for layer in manifest.layers}
    size = f"{widths.pop()}bit" if len(widths) == 1 else f"{manifest.bits_per_weight:.1f}bpw"
    return f"{original}-{_format(manifest)}-{size}"


def _pipeline_tag(config: Mapping[str, Any]) -> str | None:
    """Returns the hub's name of what a model does; None: not known."""
    names = config.get("architectures") or [""]
    if "vision_config" in config and str(names[0]).endswith("ForConditionalGeneration"):
        return "image-text-to-text"
    return next((tag for end, tag in PIPELINE_TAGS.items() if str(names[0]).endswith(end)), None)


def _sections(
    name: str,
    base_model: str | None,
    manifest: Manifest,
    config: Mapping[str, Any],
    accuracy: str,
) -> Iterator[str]:
    """Yields the parts of our text; `accuracy` is the table of what was measured, or empty."""
    widths = sorted({layer.bits for layer in manifest.layers})
    original = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a model"
    yield f"# {name}"
    yield (
        f"{original[0].upper() + original[1:]}, quantized to {' and '.join(map(str, widths))} bits "
        "with roundwise."
    )
    yield _table(("", ""), _recipe(manifest))
    if accuracy:
        yield ACCURACY
        yield accuracy
    if manifest.served_by:
        yield "## Engines"
        yield _table(("engine", "serves this model"), _engines(manifest.served_by))
    yield "## Use"
    yield from _usage(name, manifest, config)


def _recipe(manifest: Manifest) -> Iterator[tuple[str, ...]]:
    """Yields how a checkpoint was made, as rows of label and value."""
    settings, calibration = manifest.run.config, manifest.run.calibration
    groups = {layer.group_size for layer in manifest.layers}
    yield "bits per weight", f"{manifest.bits_per_weight:.2f}, with scales and zero points"
    yield (
        "size",
        f"{format_size(manifest.bytes_after)}; the original has {format_size(manifest.bytes_before)}",
    )
    yield "layers", f"{len(manifest.layers)} are quantized, all else is unchanged"
    method = "rounded to nearest" if settings.get("method") == "rtn" else "GPTQ"
    yield "method", f"{method}, recipe {settings.get('recipe', 'best')}"
    yield (
        "grid",
        f"{'symmetric' if settings.get('sym', True) else 'asymmetric'}, groups of "
        f"{' and '.join('all channels' if g == -1 else str(g) for g in sorted(groups))}",
    )
    if calibration is not None:
        texts = ", ".join(dict.fromkeys(Path(text[0]).name for text in calibration.texts[:3]))
        more = f" and {len(calibration.texts) - 3} more" if len(calibration.texts) > 3 else ""
        yield (
            "calibration",
            f"{calibration.samples} windows, {calibration.tokens:,} tokens of {texts}{more}",
        )
    errors = [layer.relative_error for layer in manifest.layers if layer.relative_error is not None]
    if errors:
        yield "error of layer outputs", f"{sum(errors) / len(errors):.2e} of their energy, mean"


def _engines(served_by: Mapping[str, str | None]) -> Iterator[tuple[str, ...]]:
    """Yields rows of engine, with its version, and whether it serves the checkpoint."""
    for engine, reason in served_by.items():
        known = ENGINES.get(engine)
        yield (
            f"{engine} {known.version if known else ''}".strip(),
            f"no: {reason}" if reason else "yes",
        )


def _usage(name: str, manifest: Manifest, config: Mapping[str, Any]) -> Iterator[str]:
    """Yields how to load a checkpoint."""
    if any(engine.startswith("vLLM") and not why for engine, why in manifest.served_by.items()):
        yield f"```sh\nvllm serve {name}\n```"
    architecture = str((config.get("architectures") or [""])[0])
    generates = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    loader = "AutoModelForCausalLM" if generates else "AutoModel"
    yield (
        "```python\n"
        "import roundwise  # transformers then computes from the packed weights\n"
        f"from transformers import {loader}, AutoTokenizer\n\n"
        f"model = {loader}.from_pretrained({json.dumps(name)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})\n"
        "```"
    )


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """Returns a table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
