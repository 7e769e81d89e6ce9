"""Auditing a finished checkpoint from its files alone: nothing is taken from memory or on trust.

Every check is one finding: what was checked, and what was wrong. Works on checkpoints of other tools
too, as far as there is something to hold them against.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from roundwise.checkpoint.gptq_format import quantized_layers, read_quantization_config
from roundwise.checkpoint.manifest import LayerRecord, Manifest, changed_files, read_manifest
from roundwise.checkpoint.reader import Checkpoint
from roundwise.core.quantized_weight import QuantizedWeight
from roundwise.errors import RoundwiseError, VerificationError
from roundwise.model.dequantized_view import dequantized_checkpoint
from roundwise.model.expert_weights import unquantized_tensors
from roundwise.model.norm_scaling import as_prescaled
from roundwise.model.rotate import as_quantized
from roundwise.model.streamed import split_into_linears

#: Recorded and recomputed weight errors may differ by summation order only.
TOLERANCE = 1e-3
#: Mean error in steps of the grid beyond which the zero points must have been misread.
ONE_OFF = 0.5


@dataclass
class Audit:
    """What was checked and what was found wrong."""

    folder: Path
    checked: dict[str, int] = field(default_factory=dict)
    """Kind of check -> how many were made."""
    failures: list[str] = field(default_factory=list)

    def check(self, kind: str, wrong: str | None) -> None:
        """Counts one check; `wrong` says what failed."""
        self.checked[kind] = self.checked.get(kind, 0) + 1
        if wrong:
            self.failures.append(wrong)

    def raise_on_failure(self) -> None:
        """Raises VerificationError naming the first failures."""
        if self.failures:
            more = f" (and {len(self.failures) - 3} more)" if len(self.failures) > 3 else ""
            raise VerificationError(
                f"{self.folder} failed verification: {'; '.join(self.failures[:3])}{more}"
            )


def audit(
    folder: Path, *, against: Checkpoint | None = None, config_file: str = "config.json"
) -> Audit:
    """Reads a checkpoint back and checks all that can be checked.

    Args:
        folder: the checkpoint.
        against: the model it was made from: tensors that were not quantized must be equal byte for
            byte, and the weight error of each layer must be what the manifest says.
        config_file: where its config stands; a run audits before config.json has its name.
    """
    report = Audit(folder)
    try:
        manifest = read_manifest(folder)
        if manifest is not None:
            report.checked["files"] = len(manifest.files)
            report.failures += changed_files(folder, manifest.files, config_file)
        if not report.failures:
            checkpoint = Checkpoint(folder, config_file=config_file)
            if against is not None:
                against = split_into_linears(
                    dequantized_checkpoint(against)[0], {layer.name for layer in quantized_layers(checkpoint)},
                    lm_head=bool(read_quantization_config(checkpoint).get("lm_head")),
                )  # fmt: skip
                against = as_quantized(against, read_quantization_config(checkpoint))
                against = as_prescaled(against, checkpoint, manifest.layers if manifest else [])
            _check_layers(report, checkpoint, against, manifest)
            if against is not None:
                _check_rest(report, checkpoint, against)
    except RoundwiseError as error:
        report.check("readable", str(error))
    return report


def _check_layers(
    report: Audit,
    checkpoint: Checkpoint,
    against: Checkpoint | None,
    manifest: Manifest | None,
) -> None:
    settings = read_quantization_config(checkpoint)
    recorded = {layer.name: layer for layer in (manifest.layers if manifest else [])}
    layers = list(quantized_layers(checkpoint))
    report.check("readable", None if layers else "no quantized layers")
    if settings.get("lm_head"):
        tied = checkpoint.config.get("tie_word_embeddings")
        wrong = "the head is quantized, but the config has it tied to the embedding"
        report.check("head", wrong if tied else None)
    for layer in layers:
        try:
            q = layer.read(settings.get("checkpoint_format", "gptq"))
        except RoundwiseError as error:
            report.check("layers", str(error))
            continue
        report.check("layers", _wrong_values(layer.name, q, settings))
        line = next((v for k, v in recorded.items() if k.endswith(layer.name)), None)
        if against is not None:
            report.check("weight errors", _wrong_error(layer.name, q, against, line))


def _wrong_values(name: str, q: QuantizedWeight, settings: dict[str, Any]) -> str | None:
    # A negative scale is sound: it turns a symmetric range, which has one more code below, around.
    if not bool(torch.isfinite(q.scales).all()) or not bool((q.scales != 0).all()):
        return f"{name} has a scale that is zero or not finite"
    counts = torch.bincount(q.g_idx, minlength=q.scales.shape[1])
    size = -(-len(q.g_idx) // q.scales.shape[1])
    if int(counts.max()) > size:
        return f"{name}.g_idx puts {int(counts.max())} channels into a group of {size}"
    trivial = bool((q.g_idx == torch.arange(len(q.g_idx)) // size).all())
    if not trivial and not settings.get("desc_act"):
        return f"{name}.g_idx is in act-order, but the config says desc_act is off"
    return None


def _wrong_error(
    name: str, q: QuantizedWeight, against: Checkpoint, line: LayerRecord | None
) -> str | None:
    info = against.tensors.get(f"{name}.weight")
    if info is None:
        return f"{name} is quantized, but {against.folder} has no {name}.weight"
    stored, Q = info.read().to(torch.float32), q.dequantize()
    # Conv1D keeps [in, out]; a square weight does not tell, so the nearer of both is meant.
    candidates = [W for W in (stored, stored.T) if W.shape == Q.shape]
    if not candidates:
        return f"{name} is {list(Q.shape)}, but its original is {list(info.shape)}"
    W = min(candidates, key=lambda W: float((W - Q).square().sum()))
    error = float((W - Q).square().sum()) / max(float(W.square().sum()), 1e-30)
    if line is None:
        steps = float(((W - Q) / q.scales.to(torch.float32)[:, q.g_idx.long()]).mean())
        if abs(steps) > ONE_OFF:
            return f"{name} is off by one step everywhere: is checkpoint_format right?"
        return f"{name} is no better than nothing: weight error {error:.2f}" if error > 1 else None
    expected = line.weight_error
    if abs(error - expected) > TOLERANCE * max(expected, 1e-6):
        return f"{name} has weight error {error:.6g}, but {expected:.6g} was recorded"
    return None


def _check_rest(report: Audit, checkpoint: Checkpoint, against: Checkpoint) -> None:
    """Tensors that were not quantized, and side files, equal the original's byte for byte."""
    stems = {layer.name for layer in quantized_layers(checkpoint)}
    for name, original in unquantized_tensors(against.tensors, stems).items():
        copy = checkpoint.tensors.get(name)
        wrong = None
        if copy is None:
            wrong = f"tensor {name} is missing"
        elif (copy.dtype, copy.shape) != (original.dtype, original.shape):
            wrong = f"tensor {name} is {copy.dtype} {list(copy.shape)}, it was {original.dtype}"
        elif any(a != b for a, b in zip(copy.chunks(), original.chunks(), strict=True)):
            wrong = f"tensor {name} differs from the original"
        report.check("tensors carried over", wrong)
    for path in against.side_files():
        missing = not (checkpoint.folder / path.name).exists()
        report.check("side files", f"{path.name} is missing" if missing else None)
