"""Scales moved from a norm's gains into the columns of the linears that it feeds, exactly.

The norm's gain g becomes g / s, its readers' weights W diag(s). What is stored is g / s rounded to the
checkpoint's type, and s is taken to be the quotient of both gains as stored: so nothing is lost by
that rounding, and whoever has both checkpoints can tell s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.pytorch_utils import Conv1D

from roundwise.checkpoint.manifest import LayerRecord
from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.transformed_view import TensorTransform, TransformedCheckpoint
from roundwise.errors import CheckpointError, ConfigError
from roundwise.model.residual_trace import trace
from roundwise.model.rotate import check_unchanged
from roundwise.model.streamed import StreamedModel, open_streamed_model


@dataclass(frozen=True)
class ScalableNorm:
    """A norm whose gains can take scales, by the names of tensors in the checkpoint."""

    weight: str
    bias: str | None
    offset: float
    """Its gains are weight + offset."""
    readers: dict[str, tuple[str, int]]
    """Module name of each linear it feeds -> weight tensor, axis of the input channels."""

    def changes(self, s: torch.Tensor) -> dict[str, TensorTransform]:
        """What becomes of the norm's own tensors, for s float64 [in]."""
        found = {self.weight: TensorTransform(gain=1.0 / s, offset=self.offset)}
        return found | ({self.bias: TensorTransform(gain=1.0 / s)} if self.bias else {})

    def storable(self, weight: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The scales, float64 [in], nearest to `s` that the type of the norm's `weight` can hold.

        A channel whose gain is zero, or would become zero or infinite, is not scaled.
        """
        gain = weight.to(torch.float64) + self.offset
        stored = (gain / s.to(torch.float64) - self.offset).to(weight.dtype)
        after = stored.to(torch.float64) + self.offset
        sound = torch.isfinite(after) & (gain * after > 0)
        return torch.where(sound, gain / torch.where(sound, after, 1.0), 1.0)


def scalable_norms(source: Checkpoint) -> list[ScalableNorm]:
    """The norms in the blocks that feed linears and nothing else.

    Found by a trace, and checked: with random scales on all of them, every block returns the same.

    Raises:
        ConfigError: the model has none, or a block reads a norm's output in another way as well.
    """
    try:
        streamed = open_streamed_model(source, dtype=torch.float32)
        found = trace(streamed)
        norms = [
            _by_tensors(streamed, norm.name, norm.readers, norm.offset)
            for passed in found.blocks
            for norm in passed.norms
        ]
        if not norms:
            raise ConfigError("it has no norms in front of linear layers")
        generator = torch.Generator().manual_seed(0)
        changes: dict[str, TensorTransform] = {}
        for norm in norms:
            width = source.tensors[norm.weight].shape[0]
            s = torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
            changes |= norm.changes(s)
            changes |= {name: TensorTransform(axis, gain=s) for name, axis in norm.readers.values()}
        check_unchanged(found, TransformedCheckpoint(source, changes, exact=True))
    except ConfigError as error:
        raise ConfigError(
            f"{source.folder} cannot be prescaled: {error}; leave --prescale out"
        ) from None
    return norms


def _by_tensors(
    streamed: StreamedModel, norm: str, readers: tuple[str, ...], offset: float
) -> ScalableNorm:
    names = streamed.checkpoint_name_of
    axes = {
        reader: 0 if isinstance(streamed.model.get_submodule(reader), Conv1D) else -1
        for reader in readers
    }
    return ScalableNorm(
        weight=names[f"{norm}.weight"],
        bias=names.get(f"{norm}.bias"),
        offset=offset,
        readers={reader: (names[f"{reader}.weight"], axis) for reader, axis in axes.items()},
    )


def as_prescaled(
    source: Checkpoint, quantized: Checkpoint, layers: Sequence[LayerRecord]
) -> Checkpoint:
    """The original with the scales that a quantized checkpoint's norms show.

    Args:
        source: the original.
        quantized: the checkpoint made from it.
        layers: of its manifest; `prescale` of each says which norm it shares scales with.

    Raises:
        CheckpointError: the manifest names tensors that are not there.
    """
    norms: dict[str, TensorTransform] = {}
    weights: dict[str, TensorTransform] = {}
    for line in layers:
        record = line.prescale
        if record is None:
            continue
        try:
            norm = ScalableNorm(record.norm, record.bias, record.offset, {})
            before, after = (
                c.tensors[norm.weight].read().to(torch.float64) + norm.offset
                for c in (source, quantized)
            )
            # A gain of zero stays as it is: nothing passes.
            s = torch.where(before == after, 1.0, before / after)
            weights[record.weight] = TensorTransform(record.axis, gain=s)
            norms |= norm.changes(s)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"roundwise.json of {quantized.folder} describes the scales of {line.name} in a "
                f"way that cannot be followed: {error}"
            ) from None
    if not weights:
        return source
    try:
        return TransformedCheckpoint(TransformedCheckpoint(source, weights, exact=True), norms)
    except KeyError as error:
        raise CheckpointError(f"{source.folder} lacks {error}, which was scaled") from None
