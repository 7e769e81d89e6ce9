"""The model without its weights, and where each weight is: blocks, linears, names.

The model is built by transformers on the meta device, so a 400B model costs nothing. Its repeated
blocks are found by shape, not by name: no file per architecture.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from roundwise.checkpoint.reader import Checkpoint, TensorInfo
from roundwise.checkpoint.untrusted import limit_module_count, parse_model_dtype
from roundwise.model.blocks import Block, find_blocks, head_block, is_tied, untie, untied_checkpoint
from roundwise.model.build import build, load_config
from roundwise.model.dequantized_view import dequantized_checkpoint
from roundwise.model.expert_weights import Layout, install_linear_experts, replace_fused_experts
from roundwise.model.tensor_names import map_names
from roundwise.system.device import HOST, keep_embedding_on_host


@dataclass
class StreamedModel:
    """A model on the meta device and the map from its tensors to the checkpoint's."""

    model: transformers.PreTrainedModel
    checkpoint: Checkpoint
    blocks: list[Block]
    checkpoint_name_of: dict[str, str]
    """Name of a parameter or buffer in the model -> name of the tensor in the checkpoint."""
    dtype: torch.dtype
    device: torch.device = HOST
    """Where blocks are loaded, and all else that a forward needs but tables of embeddings."""
    skipped_blocks: list[Block] = field(default_factory=list)
    """Blocks of which nothing is quantized, because a forward with text does not reach them."""
    layout: Layout = field(default_factory=dict)
    """Where there are experts, and what their projections are called."""
    notes: list[str] = field(default_factory=list)
    """What is to be said about the checkpoint."""
    _block_of: dict[str, int] = field(default_factory=dict)
    _maps: dict[str, mmap.mmap] = field(default_factory=dict)
    """Name of a module -> where its loaded weight lives."""
    _outside: list[str] = field(default_factory=list)
    """Names of the modules outside the blocks."""
    _computed: list[tuple[nn.Module, str]] = field(default_factory=list)
    """What was loaded with `_outside`, but is no map."""

    def block_tensors(self, index: int) -> dict[str, TensorInfo]:
        """All tensors of the checkpoint that belong to block `index`, by their names there."""
        tensors = self.checkpoint.tensors
        return {name: tensors[name] for name, block in self._block_of.items() if block == index}

    def prefetch(self, index: int) -> None:
        """Has the system read block `index`, if there is one, while others are worked on."""
        for info in self.block_tensors(index).values():
            info.prefetch()

    def other_tensors(self) -> dict[str, TensorInfo]:
        """The tensors of the checkpoint outside all blocks."""
        return {n: info for n, info in self.checkpoint.tensors.items() if n not in self._block_of}

    def skip_blocks(self, blocks: list[Block]) -> None:
        """Treats some blocks as everything else outside the blocks; they are in `skipped_blocks` from then on."""
        self.skipped_blocks += blocks
        names = {block.name for block in blocks}
        self.blocks = [block for block in self.blocks if block.name not in names]
        self._block_of = dict(_blocks_of_tensors(self))

    def load(
        self, module: nn.Module, prefix: str, *, recurse: bool = True, aligned: bool = True
    ) -> None:
        """Gives the meta parameters and buffers of `module` (named `prefix`) their values.

        Unless `aligned`, tensors are mapped even if their place in the file is not aligned.
        """
        for owner, name, key in _tensors_of(module, prefix, recurse=recurse):
            current = owner._parameters.get(name, owner._buffers.get(name))
            device = HOST if _is_table(owner, recurse=recurse) else self.device
            if (
                current is None
                or current.device.type != "meta"
                or key not in self.checkpoint_name_of
            ):
                if name in owner._buffers and current is not None and not current.is_meta:
                    owner._buffers[name] = current.to(device)  # computed, not stored
                continue
            info = self.checkpoint.tensors[self.checkpoint_name_of[key]]
            value, view = info.memory_mapped(aligned=aligned and device == HOST)
            if view is not None and name == "weight" and device == HOST:
                self._maps[key.removesuffix(".weight")] = view
            if view is None and not aligned:
                self._computed.append((owner, name))
            value = value.to(device, current.dtype if value.is_floating_point() else None)
            if name in owner._parameters:
                owner._parameters[name] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[name] = value

    def release_pages(self, names: list[str] | None = None) -> None:
        """Gives memory of mapped weights back, for now: it is read again should it be needed.

        Tables outside the blocks that are no map (they were folded while being read) are put back on
        the meta device instead: using one from then on is an error.

        Args:
            names: modules that have done their work; None: all outside the blocks, such as the
                embeddings once all batches are in the first block.
        """
        for name in self._outside if names is None else names:
            if name in self._maps:
                self._maps[name].madvise(mmap.MADV_DONTNEED)
        for owner, name in self._computed if names is None else []:
            value = owner._parameters.get(name)
            if value is not None and value.ndim > 1:
                owner._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)
        if names is None:
            self._computed = []

    def load_outside_blocks(self) -> None:
        """Loads embeddings, norms and whatever else is not in a block; the head only when tied."""
        names = {block.name for block in self.blocks}
        head = self.model.get_output_embeddings()
        for path, owner in self.model.named_modules():
            inside = any(path == name or path.startswith(f"{name}.") for name in names)
            # The paused forward ends behind the last block: a head that is no block is never reached.
            if not inside and owner is not head:
                self.load(owner, path, recurse=False, aligned=False)
                self._outside.append(path)
                if _is_table(owner, recurse=False) and self.device != HOST:
                    keep_embedding_on_host(owner, self.device)

    def unload(self, module: nn.Module, prefix: str) -> None:
        """Puts what `load` gave back on the meta device, freeing its memory."""
        for owner, name, key in _tensors_of(module, prefix):
            if key not in self.checkpoint_name_of:
                continue
            self._maps.pop(key.removesuffix(".weight"), None)
            if owner._parameters.get(name) is not None:
                value = owner._parameters[name]
                assert value is not None
                owner._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)
            elif owner._buffers.get(name) is not None:
                buffer = owner._buffers[name]
                assert buffer is not None
                owner._buffers[name] = buffer.to("meta")


def open_streamed_model(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    lm_head: bool = False,
    device: torch.device = HOST,
) -> StreamedModel:
    """Builds the model of a checkpoint on the meta device and maps its tensors.

    Args:
        source: folder, or a checkpoint that is open already.
        dtype: what the model is to compute in instead of what its config says.
        lm_head: the output head becomes the last block, with a weight of its own.
        device: where it is to run.

    Raises:
        CheckpointError: the architecture is unknown, needs its own code, or tensors are missing.
        ConfigError: the model has no repeated blocks with linear layers, or is quantized already.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    checkpoint, notes = dequantized_checkpoint(checkpoint)
    config = load_config(checkpoint)
    dtype = dtype or _model_dtype(config, checkpoint)
    with limit_module_count(len(checkpoint.tensors)):
        model = build(config, dtype)
    checkpoint, layout = install_linear_experts(model, checkpoint)
    checkpoint_name_of = map_names(model, checkpoint)
    if lm_head:
        # Built again: what is tied once stays so.
        if is_tied(config):
            untie(config)
            model = build(config, dtype)
            replace_fused_experts(model, layout)
        checkpoint = untied_checkpoint(checkpoint, model, checkpoint_name_of)
    blocks = find_blocks(model)
    if lm_head:
        blocks.append(head_block(model))
    streamed = StreamedModel(
        model, checkpoint, blocks, checkpoint_name_of, dtype, device, layout=layout, notes=notes
    )
    streamed._block_of = dict(_blocks_of_tensors(streamed))
    return streamed


def split_into_linears(checkpoint: Checkpoint, layers: set[str], *, lm_head: bool) -> Checkpoint:
    """The checkpoint with a tensor for each of `layers`: for each expert, for a head that is tied."""
    if all(f"{name}.weight" in checkpoint.tensors for name in layers):
        return checkpoint
    return open_streamed_model(checkpoint, lm_head=lm_head).checkpoint


def _is_table(owner: nn.Module, *, recurse: bool) -> bool:
    """An embedding outside the blocks, which is loaded by itself."""
    return isinstance(owner, nn.Embedding) and not recurse


def _tensors_of(
    module: nn.Module, prefix: str, *, recurse: bool = True
) -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, local name, full name) of every parameter and buffer of `module`, or below it too."""
    for path, owner in module.named_modules(prefix=prefix) if recurse else [(prefix, module)]:
        for name in [*owner._parameters, *owner._buffers]:
            yield owner, name, f"{path}.{name}" if path else name


def _model_dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype the model computes in: the config's, else that of its largest tensor."""
    text = config.get_text_config()
    for value in (getattr(config, "dtype", None), getattr(text, "dtype", None)):
        if value is not None:
            return parse_model_dtype(value)
    largest = max(checkpoint.tensors.values(), key=lambda info: info.nbytes)
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(largest.dtype, torch.float32)


def _blocks_of_tensors(streamed: StreamedModel) -> Iterator[tuple[str, int]]:
    """(checkpoint tensor, block index) for every tensor that a block loads."""
    for name, key in streamed.checkpoint_name_of.items():
        for index, block in enumerate(streamed.blocks):
            if name.startswith(f"{block.name}."):
                yield key, index
