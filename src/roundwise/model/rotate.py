"""Rotates a model's residual stream without changing what the model computes.

As in QuaRot (arXiv 2404.00456) and SliceGPT (arXiv 2401.15024), the gain g of each norm is folded into
the linears behind it, so that the norm commutes with the orthogonal Q. Then readers W become
W diag(g) Q, writers Qᵀ W (and their biases b Q), and embeddings E Q. The bias of a layer norm becomes
(b / g) Q. The architecture does not change, and nothing is added at run time. The last norm's gain goes
into the head, so a tied head gets its own weight.

Which linears read and write is found by tracing a forward; a second forward checks the rotated model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from roundwise.checkpoint.reader import Checkpoint, TensorInfo
from roundwise.checkpoint.transformed_view import TensorTransform, TransformedCheckpoint
from roundwise.config import QuantizeConfig
from roundwise.core.hadamard import Rotation
from roundwise.errors import CheckpointError, ConfigError
from roundwise.model.blocks import Block, output_head_name
from roundwise.model.build import text_config
from roundwise.model.finite import check_finite
from roundwise.model.residual_trace import (
    Norm,
    ResidualTrace,
    hidden_states_of,
    is_close,
    run_forward,
    trace_residual_stream,
)
from roundwise.model.streamed import StreamedModel, open_streamed_model

#: Relative distance up to which float32 results before and after a transform count as equal.
TOLERANCE = 1e-2


def apply_recorded_rotation(source: Checkpoint, settings: dict[str, Any]) -> Checkpoint:
    """Returns the original with the rotation, if any, that a quantized checkpoint was made with.

    Args:
        source: the original; a view that is transformed already is returned unchanged.
        settings: `quantization_config` of the quantized checkpoint.

    Raises:
        CheckpointError: the settings describe a rotation wrongly.
        ConfigError: the model cannot be rotated, so it is not the original.
    """
    meta = settings.get("meta")
    rotate = meta.get("rotate") if isinstance(meta, dict) else None
    if rotate is None or isinstance(source, TransformedCheckpoint):
        return source
    seed = rotate.get("seed") if isinstance(rotate, dict) else None
    if not isinstance(seed, int):
        raise CheckpointError(f"meta.rotate of the quantization config is damaged: {rotate!r}")
    return rotated_checkpoint(source, seed, check=False)


def open_for_run(
    folder: Path, config: QuantizeConfig, device: torch.device, *, check: bool = True
) -> StreamedModel:
    """Opens a model as a run with these settings quantizes it: rotated if they say so.

    Args:
        folder: folder of the checkpoint.
        config: `lm_head`, `towers`, `rotate` and `rotation_seed` count.
        device: device to compute on.
        check: read all weights once, to find those that are not finite and to check the rotation.

    Raises:
        CheckpointError: the model cannot be opened, or holds NaN or infinity.
        ConfigError: it cannot be rotated.
    """
    opened = partial(
        open_streamed_model, lm_head=config.lm_head, include_towers=config.towers, device=device
    )
    streamed = opened(folder)
    if check:
        check_finite(streamed, config)
    if not config.rotate:
        return streamed
    rotated = rotated_checkpoint(streamed.checkpoint, config.rotation_seed, check=check)
    return replace(opened(rotated), warnings=streamed.warnings)


def rotated_checkpoint(
    source: Checkpoint, seed: int, *, check: bool = True
) -> TransformedCheckpoint:
    """Returns a view of the checkpoint with its residual stream rotated.

    Args:
        source: the original.
        seed: seed of the random rotation.
        check: compare every block and the logits of both models before returning.

    Raises:
        ConfigError: the model's norms or blocks do not allow a rotation; the message says which.
    """
    try:
        streamed = open_streamed_model(source, dtype=torch.float32)
        plan = _RotationPlan(streamed, trace_residual_stream(streamed), seed)
        if check:
            check_equivalent(plan.trace, plan.checkpoint(exact=True), plan.rotation.rows)
        return plan.checkpoint(exact=False)
    except ConfigError as error:
        raise ConfigError(f"{source.folder} cannot be rotated: {error}; remove --rotate") from None


class _RotationPlan:
    """The transform of each tensor that together rotate the residual stream.

    Args:
        streamed: the model.
        trace: trace of the model.
        seed: seed of the random rotation.

    Raises:
        ConfigError: the model's norms or blocks do not allow a rotation.
    """

    def __init__(self, streamed: StreamedModel, trace: ResidualTrace, seed: int) -> None:
        self.streamed, self.trace = streamed, trace
        self.transforms: dict[str, TensorTransform] = {}
        self.added: dict[str, TensorInfo] = {}
        self.overrides: dict[str, Any] = {}
        if trace.final_norm is None:
            raise ConfigError("it has no RMSNorm or LayerNorm between its last block and its head")
        norms = [norm for block in trace.blocks for norm in block.norms if norm.reads_stream]
        norms.append(trace.final_norm)
        centred = any(norm.centred for norm in norms)
        self.rotation = Rotation(trace.width, seed, keeps_mean=centred)
        self._untie_head()
        for norm in norms:
            self._fold_norm(norm)
        for block, call in zip(streamed.blocks, trace.blocks, strict=True):
            if not call.writers:
                raise ConfigError(
                    f"{block.name} adds more than the outputs of linear layers to the residual stream "
                    "(the outputs pass a norm, or come from fused experts)"
                )
            for name in call.writers:
                self._transform_linear(name, TensorTransform(rotation=self.rotation), reads=False)
        inside = {id(module) for block in streamed.blocks for module in block.module.modules()}
        for name, module in streamed.model.named_modules():
            if isinstance(module, nn.Embedding) and id(module) not in inside:
                self._add(f"{name}.weight", TensorTransform(rotation=self.rotation))

    def checkpoint(self, *, exact: bool) -> TransformedCheckpoint:
        """Returns the rotated view; exact: in float32 instead of the source's type."""
        return TransformedCheckpoint(
            self.streamed.checkpoint, self.transforms,
            added=self.added, overrides=self.overrides, exact=exact,
        )  # fmt: skip

    def _untie_head(self) -> None:
        """Gives the output head its own tensor if it shares the embedding's."""
        streamed = self.streamed
        if text_config(streamed.model.config).tie_word_embeddings:
            self.overrides = {"tie_word_embeddings": False}
        head = f"{output_head_name(streamed.model)}.weight"
        stored = streamed.checkpoint_name_of[head]
        if list(streamed.checkpoint_name_of.values()).count(stored) > 1:
            self.added[head] = streamed.checkpoint.tensors[stored]
            streamed.checkpoint_name_of[head] = head

    def _fold_norm(self, norm: Norm) -> None:
        """Moves the norm's gain into its readers, sets it to 1, and rotates the norm's bias."""
        infos = {**self.streamed.checkpoint.tensors, **self.added}
        weight = infos[self.streamed.checkpoint_name_of[f"{norm.name}.weight"]].read()
        gain = weight.to(torch.float64) + norm.offset
        for reader in norm.readers:
            transform = TensorTransform(gain=gain, rotation=self.rotation)
            self._transform_linear(reader, transform, reads=True)
        self._add(f"{norm.name}.weight", TensorTransform(fill=1.0 - norm.offset))
        bias = f"{norm.name}.bias"
        if bias in self.streamed.checkpoint_name_of:
            if not bool(gain.all()):
                raise ConfigError(f"{norm.name} has a bias and a gain of zero")
            self._add(bias, TensorTransform(gain=1.0 / gain, rotation=self.rotation))

    def _transform_linear(self, name: str, transform: TensorTransform, *, reads: bool) -> None:
        """Transforms a linear along its input channels if `reads`, else along its output channels."""
        transposed = isinstance(self.streamed.model.get_submodule(name), Conv1D)
        self._add(f"{name}.weight", replace(transform, axis=-1 if reads != transposed else 0))
        if not reads and f"{name}.bias" in self.streamed.checkpoint_name_of:
            self._add(f"{name}.bias", transform)

    def _add(self, name: str, transform: TensorTransform) -> None:
        """Adds the transform of the model's tensor `name`; a stored tensor can have only one."""
        stored = self.streamed.checkpoint_name_of[name]
        if stored in self.transforms:
            raise ConfigError(f"tensor {stored} is used in two places of the residual stream")
        self.transforms[stored] = transform


@torch.no_grad()
def check_equivalent(
    trace: ResidualTrace,
    checkpoint: Checkpoint,
    rotate: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> None:
    """Checks that a transformed checkpoint computes what its original does.

    A forward of the transformed model runs each block on the rotated input of the trace, and compares
    its output, the embedding's output and the logits with the trace.

    Args:
        trace: trace of the original.
        checkpoint: the transformed checkpoint, in float32.
        rotate: rotates rows [..., hidden] of the residual stream; by default it is not rotated.

    Raises:
        ConfigError: a block's input, a block's output or the logits differ; the message says which.
    """
    streamed = open_streamed_model(checkpoint, dtype=torch.float32)
    calls = iter(trace.blocks)

    def wrap(block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
        def checked_forward(*args: Any, **kwargs: Any) -> Any:
            call = next(calls)
            x, block_input = rotate(call.x).float(), hidden_states_of(args, kwargs)
            if block_input is None or not is_close(block_input, x, TOLERANCE):
                raise ConfigError(
                    f"the input of {block.name} is not rotated as a whole (a norm behind the embedding?)"
                )
            streamed.load(block.module, block.name)
            args, kwargs = _with_hidden_states(x, call.args, call.kwargs)
            output = forward(*args, **kwargs)
            expected = rotate(call.y).float()
            y = output[0] if isinstance(output, tuple) else output
            # Relative to what the block adds: the stream itself may be far larger.
            if not is_close(y - x, expected - x, TOLERANCE):
                raise ConfigError(
                    f"{block.name} also reads or writes the residual stream in another way"
                )
            streamed.unload(block.module, block.name)
            return (expected, *output[1:]) if isinstance(output, tuple) else expected

        return checked_forward

    logits = run_forward(streamed, wrap)
    assert trace.logits is not None
    if not is_close(logits, trace.logits, TOLERANCE):
        raise ConfigError("its logits would change")


def _with_hidden_states(
    x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a block with its hidden states replaced by x."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
