"""Audits a finished checkpoint from its files alone.

Checkpoints of other tools can be audited too; without a manifest or the original, fewer checks are made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from roundwise.checkpoint.manifest import LayerRecord, Manifest, find_record, read_manifest
from roundwise.checkpoint.quantization_config import read_quantization_config
from roundwise.checkpoint.quantized_layers import find_layers, quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.side_files import changed_files
from roundwise.core.quantized_weight import QuantizedWeight
from roundwise.errors import RoundwiseError, VerificationError
from roundwise.model.blocks import check_quantized_head, quantized_head
from roundwise.model.build import load_config
from roundwise.model.dequantized_view import dequantized_checkpoint
from roundwise.model.expert_weights import unquantized_tensors
from roundwise.model.rotate import apply_recorded_rotation
from roundwise.model.streamed import unfused_checkpoint
from roundwise.system.activity import announce

#: Recorded and recomputed weight errors may differ by summation order only.
TOLERANCE = 1e-3
#: Mean error, in quantization steps, beyond which the zero points must have been misread.
MAX_MEAN_STEPS = 0.5


@dataclass
class Audit:
    """Result of an audit: the checks that were made and those that failed."""

    folder: Path
    checked: dict[str, int] = field(default_factory=dict)
    """Kind of check -> number of checks."""
    failures: list[str] = field(default_factory=list)
    """One line per failed check."""
    notes: list[str] = field(default_factory=list)
    """One line per difference that says nothing about the weights, such as a tokenizer saved again."""

    def check(self, kind: str, failure: str | None) -> None:
        """Counts one check.

        Args:
            kind: kind of check, such as "layers".
            failure: description of what is wrong; None: the check passed.
        """
        self.checked[kind] = self.checked.get(kind, 0) + 1
        if failure:
            self.failures.append(failure)

    def raise_on_failure(self) -> None:
        """Raises VerificationError with the first three failures, if there are any."""
        if self.failures:
            more = f" (and {len(self.failures) - 3} more)" if len(self.failures) > 3 else ""
            raise VerificationError(
                f"{self.folder} failed verification: {'; '.join(self.failures[:3])}{more}"
            )


def audit(
    folder: Path, *, against: Checkpoint | None = None, config_file: str = "config.json"
) -> Audit:
    """Reads a checkpoint back and checks its files, layers and, given the original, its accuracy.

    Args:
        folder: folder of the checkpoint.
        against: the model it was made from. Tensors that were not quantized must equal the original's
            byte for byte, and the weight error of each layer must be the one in the manifest.
        config_file: name of its config; a run audits before it renames the config to config.json.

    Returns:
        The result; errors while reading are failures of the kind "readable", not exceptions.
    """
    report = Audit(folder)
    try:
        manifest = read_manifest(folder)
        if manifest is not None:
            report.checked["files"] = len(manifest.files)
            changed = changed_files(folder, manifest.files, config_file)
            report.failures += changed.evidence
            report.notes += changed.notes
        if not report.failures:
            checkpoint = Checkpoint(folder, config_file=config_file)
            if against is not None:
                config = read_quantization_config(checkpoint)
                layers = {layer.name for layer in find_layers(checkpoint.tensors, config)}
                against = unfused_checkpoint(
                    dequantized_checkpoint(against)[0], layers,
                    lm_head=quantized_head(layers) is not None,
                )  # fmt: skip
                against = apply_recorded_rotation(against, config.raw)
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
    """Checks the values of each quantized layer and, given the original, its weight error."""
    recorded = {layer.name: layer for layer in (manifest.layers if manifest else [])}
    layers = quantized_layers(checkpoint)
    report.check("readable", None if layers else "no quantized layers")
    check_quantized_head(lambda: load_config(checkpoint), [layer.name for layer in layers])
    for index, layer in enumerate(layers):
        announce("checking layers", index, len(layers))
        try:
            q = layer.read()
        except RoundwiseError as error:
            report.check("layers", str(error))
            continue
        report.check("layers", None)
        if against is not None:
            record = find_record(recorded, layer.name)
            report.check("weight errors", weight_error_failure(layer.name, q, against, record))


def weight_error_failure(
    name: str, q: QuantizedWeight, against: Checkpoint, record: LayerRecord | None
) -> str | None:
    """Compares a layer's weight with the original.

    Args:
        name: name of the layer.
        q: its quantized weight.
        against: the original.
        record: the layer in the manifest; None: there is no manifest.

    Returns:
        Description of what is wrong; None: ||W - Q||² / ||W||² is the recorded one or, without a record,
        plausible.
    """
    info = against.tensors.get(f"{name}.weight")
    if info is None:
        return f"{name} is quantized, but {against.folder} has no {name}.weight"
    stored, Q = info.read().to(torch.float32), q.dequantize()
    # Conv1D stores [in, out]. For a square weight that is not visible, so the closer one is used.
    candidates = [W for W in (stored, stored.T) if W.shape == Q.shape]
    if not candidates:
        return f"{name} is {list(Q.shape)}, but its original is {list(info.shape)}"
    W = min(candidates, key=lambda W: float((W - Q).square().sum()))
    error = float((W - Q).square().sum()) / max(float(W.square().sum()), 1e-30)
    if record is None:
        steps = float(((W - Q) / q.scales.to(torch.float32)[:, q.g_idx.long()]).mean())
        if abs(steps) > MAX_MEAN_STEPS:
            return f"{name} is off by one step everywhere: check checkpoint_format in its config"
        return (
            f"{name} has weight error {error:.2f}, worse than a zero weight" if error > 1 else None
        )
    expected = record.weight_error
    if abs(error - expected) > TOLERANCE * max(expected, 1e-6):
        return f"{name} has weight error {error:.6g}, but {expected:.6g} was recorded"
    return None


def _check_rest(report: Audit, checkpoint: Checkpoint, against: Checkpoint) -> None:
    """Checks that unquantized tensors equal the original's byte for byte, and that side files exist."""
    layers = {layer.name for layer in quantized_layers(checkpoint)}
    for name, original in unquantized_tensors(against.tensors, layers).items():
        copy = checkpoint.tensors.get(name)
        failure = None
        if copy is None:
            failure = f"tensor {name} is missing"
        elif (copy.dtype, copy.shape) != (original.dtype, original.shape):
            failure = (
                f"tensor {name} is {copy.dtype} {list(copy.shape)}, but its original is "
                f"{original.dtype} {list(original.shape)}"
            )
        elif any(a != b for a, b in zip(copy.chunks(), original.chunks(), strict=True)):
            failure = f"tensor {name} differs from the original"
        report.check("tensors carried over", failure)
    for path in against.side_files():
        relative = path.relative_to(against.folder)
        missing = not (checkpoint.folder / relative).exists()
        report.check("side files", f"{relative} is missing" if missing else None)
