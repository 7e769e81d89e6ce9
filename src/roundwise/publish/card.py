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

from roundwise.checkpoint.engines import ENGINES
from roundwise.checkpoint.manifest import Manifest, read_manifest
from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.untrusted import read_json
from roundwise.checkpoint.writer import atomic_write
from roundwise.errors import CheckpointError
from roundwise.system.memory import format_size

CARD = "README.md"
#: Comments around our part of a card.
BEGIN, END = "<!-- written by roundwise -->", "<!-- end of what roundwise wrote -->"
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


@dataclass(frozen=True)
class Measurement:
    """Accuracy of a checkpoint, as `roundwise compare --json` measured it."""

    perplexity: tuple[float, float] | None
    """The original's and the checkpoint's; None, as the two below: there was no text."""
    kl_divergence: float | None
    top1_agreement: float | None
    tasks: tuple[tuple[str, str, float, float], ...] = ()
    """Task, metric, the original's value and the checkpoint's."""
    text: str = "held-out text"
    """Name of the text."""


def read_measurement(file: Path, name: str) -> Measurement:
    """Reads the output of `roundwise compare --json`.

    Args:
        file: the output, saved.
        name: name of the checkpoint's folder; it tells which of several models is meant.

    Raises:
        CheckpointError: the file is something else, or has no model of this name.
    """
    value = read_json(file)
    try:
        models = [model for model in value["models"] if model["name"] == name]
        if not models:
            raise CheckpointError(
                f"{file} has no model {name}: it is of {', '.join(m['name'] for m in value['models'])}"
            )
        model = models[0]
        pair = model["perplexity"]
        return Measurement(
            perplexity=(float(pair["base"]), float(pair["quantized"])) if pair else None,
            kl_divergence=model["kl_divergence"],
            top1_agreement=model["top1_agreement"],
            tasks=tuple(
                (str(t["task"]), str(t["metric"]), float(t["base"]), float(t["quantized"]))
                for t in model["tasks"]
            ),
            text=str(model.get("text") or "held-out text"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} is not what `roundwise compare --json` prints: {error!r} is missing or wrong"
        ) from None


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
        source: folder of the original, whose card is kept below ours; None: what is in `folder` is kept.
        base_model: hub id of the original; None: the one in the card that is kept, if it has one.
        name: name of the model in the card, such as its hub id; None: made of the original's.
        measurement: accuracy to state; None: none.

    Returns:
        The file.

    Raises:
        StorageError: the disk is full or failed.
    """
    metadata, text = _read_card((source or folder) / CARD)
    if source is None:
        base_model = base_model or metadata.get("base_model")
    name = name or _default_name(manifest)
    data = _metadata(metadata, manifest, config, base_model)
    if measurement is not None:
        data.model_name, data.eval_results = name, list(_results(measurement)) or None
    own = "\n\n".join(_sections(name, base_model, manifest, config, measurement))
    path = folder / CARD
    with atomic_write(path) as file:
        file.write(f"---\n{data.to_yaml()}\n---\n{BEGIN}\n{own}\n{END}\n{text}".encode())
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


def _read_card(file: Path) -> tuple[dict[str, Any], str]:
    """Returns metadata and text of a card without our part; metadata that are damaged stay text."""
    if not file.is_file():
        return {}, ""
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
    _, end, after = rest.partition(END)
    return (metadata if is_parsed else {}), (before + after.lstrip("\n") if end else text)


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


def _results(measured: Measurement) -> Iterator[EvalResult]:
    """Yields what was measured as the hub has it."""
    values = (
        ("perplexity", "perplexity", measured.perplexity and measured.perplexity[1]),
        ("kl_divergence", "KL divergence to the original, nats per token", measured.kl_divergence),
        ("top1_agreement", "top-1 agreement with the original", measured.top1_agreement),
    )
    for metric, title, value in values:
        if value is not None:
            yield EvalResult(
                task_type="text-generation", dataset_type="text", dataset_name=measured.text,
                metric_type=metric, metric_name=title, metric_value=value,
            )  # fmt: skip
    for task, metric, _, value in measured.tasks:
        yield EvalResult(
            task_type="text-generation", dataset_type=task, dataset_name=task,
            metric_type=metric, metric_value=value,
        )  # fmt: skip


def _sections(
    name: str,
    base_model: str | None,
    manifest: Manifest,
    config: Mapping[str, Any],
    measured: Measurement | None,
) -> Iterator[str]:
    """Yields the parts of our text."""
    widths = sorted({layer.bits for layer in manifest.layers})
    original = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a model"
    yield f"# {name}"
    yield (
        f"{original[0].upper() + original[1:]}, quantized to {' and '.join(map(str, widths))} bits "
        "with roundwise."
    )
    yield _table(("", ""), _recipe(manifest))
    if measured is not None:
        yield "## Accuracy"
        yield _table((f"on {measured.text}", "original", "this model"), _accuracy(measured))
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


def _accuracy(measured: Measurement) -> Iterator[tuple[str, ...]]:
    """Yields rows of metric, the original's value and the checkpoint's."""
    if measured.perplexity is not None:
        yield "perplexity", *(f"{value:.4f}" for value in measured.perplexity)
    if measured.kl_divergence is not None:
        yield "KL divergence, nats per token", "0", f"{measured.kl_divergence:.5f}"
    if measured.top1_agreement is not None:
        yield "top-1 agreement", "100%", f"{measured.top1_agreement:.2%}"
    for task, metric, base, quantized in measured.tasks:
        yield f"{task}, {metric}", f"{base:.4f}", f"{quantized:.4f}"


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
