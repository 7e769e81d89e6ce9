"""Moves scales from a norm's gains into the columns of the linears behind it; the model stays the same.

The norm's gain g becomes g / s, the weights of the linears that read it W diag(s). The checkpoint stores
g / s rounded to its type, and s is defined as the quotient of the old and the new stored gain: so
rounding loses nothing, and s can be computed from the two checkpoints.
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
from roundwise.model.residual_trace import trace_residual_stream
from roundwise.model.rotate import check_equivalent
from roundwise.model.streamed import StreamedModel, open_streamed_model


@dataclass(frozen=True)
class ScalableNorm:
    """A norm whose gains can be divided by scales; tensors have their names in the checkpoint."""

    weight: str
    bias: str | None
    offset: float
    """The norm's gains are weight + offset."""
    readers: dict[str, tuple[str, int]]
    """Module name of each linear that reads the norm -> (weight tensor, axis of its input channels)."""

    def transforms(self, s: torch.Tensor) -> dict[str, TensorTransform]:
        """Returns the transforms of the norm's own tensors that divide its output by s, float64 [in]."""
        weight = {self.weight: TensorTransform(gain=1.0 / s, offset=self.offset)}
        return weight | ({self.bias: TensorTransform(gain=1.0 / s)} if self.bias else {})

    def storable_scales(self, weight: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """Returns the scales nearest to `s` whose gains the type of the norm's weight can represent.

        A channel whose gain is zero, or would become zero or infinite, gets the scale 1.

        Args:
            weight: the norm's weight [in], in the checkpoint's type.
            s: wanted scales [in].

        Returns:
            float64 [in].
        """
        gain = weight.to(torch.float64) + self.offset
        stored = (gain / s.to(torch.float64) - self.offset).to(weight.dtype)
        new_gain = stored.to(torch.float64) + self.offset
        valid = torch.isfinite(new_gain) & (gain * new_gain > 0)
        return torch.where(valid, gain / torch.where(valid, new_gain, 1.0), 1.0)


def scalable_norms(source: Checkpoint) -> list[ScalableNorm]:
    """Returns the norms in the blocks whose output only linears read.

    They are found by a traced forward and checked by a second one: with random scales on all of them,
    every block must return the same.

    Raises:
        ConfigError: the model has no such norms, or a block uses a norm's output in another way too.
    """
    try:
        streamed = open_streamed_model(source, dtype=torch.float32)
        trace = trace_residual_stream(streamed)
        norms = [
            _with_tensor_names(streamed, norm.name, norm.readers, norm.offset)
            for block in trace.blocks
            for norm in block.norms
        ]
        if not norms:
            raise ConfigError("it has no norms in front of linear layers")
        generator = torch.Generator().manual_seed(0)
        transforms: dict[str, TensorTransform] = {}
        for norm in norms:
            width = source.tensors[norm.weight].shape[0]
            s = torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
            transforms |= norm.transforms(s)
            transforms |= {
                name: TensorTransform(axis, gain=s) for name, axis in norm.readers.values()
            }
        check_equivalent(trace, TransformedCheckpoint(source, transforms, exact=True))
    except ConfigError as error:
        raise ConfigError(
            f"{source.folder} cannot be prescaled: {error}; remove --prescale"
        ) from None
    return norms


def _with_tensor_names(
    streamed: StreamedModel, norm: str, readers: tuple[str, ...], offset: float
) -> ScalableNorm:
    """Returns the `ScalableNorm` of a norm and its readers, given by their module names."""
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


def apply_recorded_scales(
    source: Checkpoint, quantized: Checkpoint, layers: Sequence[LayerRecord]
) -> Checkpoint:
    """Returns a view of the original with the scales that a run moved into its linears.

    The scales are computed from the norms of both checkpoints.

    Args:
        source: the original.
        quantized: the checkpoint made from it.
        layers: layers of its manifest; `prescale` of a layer describes the norm in front of it.

    Raises:
        CheckpointError: the manifest describes a norm wrongly, or names missing tensors.
    """
    norms: dict[str, TensorTransform] = {}
    weights: dict[str, TensorTransform] = {}
    for layer in layers:
        record = layer.prescale
        if record is None:
            continue
        try:
            norm = ScalableNorm(record.norm, record.bias, record.offset, {})
            before, after = (
                c.tensors[norm.weight].read().to(torch.float64) + norm.offset
                for c in (source, quantized)
            )
            # Equal gains include those of zero, which are not scaled.
            s = torch.where(before == after, 1.0, before / after)
            weights[record.weight] = TensorTransform(record.axis, gain=s)
            norms |= norm.transforms(s)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"roundwise.json of {quantized.folder} has an invalid prescale entry for {layer.name}: "
                f"{error}"
            ) from None
    if not weights:
        return source
    try:
        return TransformedCheckpoint(TransformedCheckpoint(source, weights, exact=True), norms)
    except KeyError as error:
        raise CheckpointError(f"{source.folder} lacks {error}, which was scaled") from None
