"""Folds that leave a model's function as it is, planned from its trace and checked before they are used.

A rotation of the residual stream (QuaRot, arXiv 2404.00456; SliceGPT, arXiv 2401.15024): the gain g of
each norm goes into the linears behind it, so that the norm commutes with the orthogonal Q; then readers
W become W diag(g) Q, writers Qᵀ W (and their biases b Q), embeddings E Q. The architecture stays plain
and nothing is computed at run time. The bias of a layer norm becomes (b / g) Q. Since the last norm's
gain goes into the head, a tied head is given its own weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from roundwise.checkpoint.reader import Checkpoint, TensorInfo
from roundwise.checkpoint.transformed_view import TensorTransform, TransformedCheckpoint
from roundwise.core.hadamard import Rotation
from roundwise.errors import CheckpointError, ConfigError
from roundwise.model.blocks import Block, head_of
from roundwise.model.residual_trace import Norm, Trace, is_close, run_forward, stream_of, trace
from roundwise.model.streamed import StreamedModel, open_streamed_model

#: Relative distance up to which float32 results before and after a fold count as the same.
TOLERANCE = 1e-2


def as_quantized(source: Checkpoint, settings: dict[str, Any]) -> Checkpoint:
    """The original as it was when a checkpoint with these settings was made from it.

    Args:
        source: the original model; one that is folded already stays as it is.
        settings: `quantization_config` of the quantized checkpoint.

    Raises:
        CheckpointError: the settings name a rotation that cannot be read.
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


def rotated_checkpoint(
    source: Checkpoint, seed: int, *, check: bool = True
) -> TransformedCheckpoint:
    """The checkpoint with its residual stream rotated.

    Args:
        source: the original.
        seed: of the rotation.
        check: compare every block and the logits of both before returning.

    Raises:
        ConfigError: the model's norms or blocks do not allow it; the sentence says what is in the way.
    """
    try:
        streamed = open_streamed_model(source, dtype=torch.float32)
        plan = _Plan(streamed, trace(streamed), seed)
        if check:
            check_unchanged(plan.found, plan.checkpoint(exact=True), plan.rotation.rows)
        return plan.checkpoint(exact=False)
    except ConfigError as error:
        raise ConfigError(
            f"{source.folder} cannot be rotated: {error}; leave --rotate out"
        ) from None


class _Plan:
    """Which tensor is changed how, for one rotation."""

    def __init__(self, streamed: StreamedModel, found: Trace, seed: int) -> None:
        self.streamed, self.found = streamed, found
        self.changes: dict[str, TensorTransform] = {}
        self.added: dict[str, TensorInfo] = {}
        self.overrides: dict[str, Any] = {}
        if found.last is None:
            raise ConfigError("no RMSNorm or LayerNorm stands between its last block and its head")
        norms = [norm for block in found.blocks for norm in block.norms if norm.of_stream]
        norms.append(found.last)
        centred = any(norm.centred for norm in norms)
        self.rotation = Rotation(found.width, seed, keeps_mean=centred)
        self._untie()
        for norm in norms:
            self._norm(norm)
        for block, passed in zip(streamed.blocks, found.blocks, strict=True):
            if not passed.writers:
                raise ConfigError(
                    f"what {block.name} adds to the residual stream is not just the output of linear "
                    "layers (a norm behind them, or fused experts)"
                )
            for name in passed.writers:
                self._linear(name, TensorTransform(rotation=self.rotation), reads=False)
        inside = {id(module) for block in streamed.blocks for module in block.module.modules()}
        for name, module in streamed.model.named_modules():
            if isinstance(module, nn.Embedding) and id(module) not in inside:
                self._set(f"{name}.weight", TensorTransform(rotation=self.rotation))

    def checkpoint(self, *, exact: bool) -> TransformedCheckpoint:
        """The source seen through the plan."""
        return TransformedCheckpoint(
            self.streamed.checkpoint, self.changes,
            added=self.added, overrides=self.overrides, exact=exact,
        )  # fmt: skip

    def _untie(self) -> None:
        """A head that shares the embedding's weight gets its own."""
        streamed = self.streamed
        if streamed.model.config.get_text_config().tie_word_embeddings:
            self.overrides = {"tie_word_embeddings": False}
        head = f"{head_of(streamed.model)}.weight"
        stored = streamed.checkpoint_name_of[head]
        if list(streamed.checkpoint_name_of.values()).count(stored) > 1:
            self.added[head] = streamed.checkpoint.tensors[stored]
            streamed.checkpoint_name_of[head] = head

    def _norm(self, norm: Norm) -> None:
        """The norm's gain goes into its readers."""
        infos = {**self.streamed.checkpoint.tensors, **self.added}
        weight = infos[self.streamed.checkpoint_name_of[f"{norm.name}.weight"]].read()
        gain = weight.to(torch.float64) + norm.offset
        for reader in norm.readers:
            self._linear(reader, TensorTransform(gain=gain, rotation=self.rotation), reads=True)
        self._set(f"{norm.name}.weight", TensorTransform(fill=1.0 - norm.offset))
        bias = f"{norm.name}.bias"
        if bias in self.streamed.checkpoint_name_of:
            if not bool(gain.all()):
                raise ConfigError(f"{norm.name} has a bias and a gain of zero")
            self._set(bias, TensorTransform(gain=1.0 / gain, rotation=self.rotation))

    def _linear(self, name: str, change: TensorTransform, *, reads: bool) -> None:
        """Changes a linear along its input or its output channels."""
        transposed = isinstance(self.streamed.model.get_submodule(name), Conv1D)
        self._set(f"{name}.weight", replace(change, axis=-1 if reads != transposed else 0))
        if not reads and f"{name}.bias" in self.streamed.checkpoint_name_of:
            self._set(f"{name}.bias", change)

    def _set(self, name: str, change: TensorTransform) -> None:
        stored = self.streamed.checkpoint_name_of[name]
        if stored in self.changes:
            raise ConfigError(f"tensor {stored} has two places in the residual stream")
        self.changes[stored] = change


@torch.no_grad()
def check_unchanged(
    found: Trace,
    checkpoint: Checkpoint,
    turn: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> None:
    """Plays every block, the embedding and the head once more, and compares with the trace.

    Args:
        found: trace of the original.
        checkpoint: the folded one, exact.
        turn: what is to happen to the residual stream.

    Raises:
        ConfigError: something differs; the sentence says where.
    """
    after = open_streamed_model(checkpoint, dtype=torch.float32)
    blocks = iter(found.blocks)

    def gate(block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
        def play(*args: Any, **kwargs: Any) -> Any:
            passed = next(blocks)
            x, arrived = turn(passed.x).float(), stream_of(args, kwargs)
            if arrived is None or not is_close(arrived, x, TOLERANCE):
                raise ConfigError(
                    f"what reaches {block.name} is not turned as a whole (a norm behind the embedding?)"
                )
            after.load(block.module, block.name)
            args, kwargs = _with_stream(x, passed.args, passed.kwargs)
            output = forward(*args, **kwargs)
            expected = turn(passed.y).float()
            y = output[0] if isinstance(output, tuple) else output
            # Relative to what the block adds: the stream itself may be far larger.
            if not is_close(y - x, expected - x, TOLERANCE):
                raise ConfigError(f"{block.name} reads or writes the stream in another way as well")
            after.unload(block.module, block.name)
            return (expected, *output[1:]) if isinstance(output, tuple) else expected

        return play

    logits = run_forward(after, gate)
    assert found.logits is not None
    if not is_close(logits, found.logits, TOLERANCE):
        raise ConfigError("its logits are not the same afterwards")


def _with_stream(
    x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with other hidden states."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
