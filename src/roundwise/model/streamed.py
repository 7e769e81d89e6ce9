"""Opens a model on the meta device whose weights are loaded block by block from its checkpoint.

Transformers builds the model on the meta device, so even a 400B model takes no memory. Its repeated
blocks are found by their structure, so no file per architecture is needed.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from roundwise.checkpoint.reader import Checkpoint, TensorInfo
from roundwise.checkpoint.untrusted import limit_module_count, parse_model_dtype
from roundwise.model.blocks import Block, find_blocks, head_block, is_tied, untie, untied_checkpoint
from roundwise.model.build import build, initialize_tensors, load_config, text_config
from roundwise.model.conversions import (
    converted_checkpoint,
    ignored_modules,
    map_tensor_names,
    stored_tensors,
)
from roundwise.model.dequantized_view import dequantized_checkpoint
from roundwise.model.expert_weights import (
    ExpertLayout,
    install_linear_experts,
    replace_fused_experts,
)
from roundwise.model.gguf_source import open_source
from roundwise.system.device import HOST, keep_embedding_on_host


@dataclass
class StreamedModel:
    """A model on the meta device, and the checkpoint that its weights are loaded from."""

    model: transformers.PreTrainedModel
    checkpoint: Checkpoint
    blocks: list[Block]
    checkpoint_name_of: dict[str, str]
    """Name of a parameter or buffer in the model -> name of the tensor in the checkpoint."""
    dtype: torch.dtype
    device: torch.device = HOST
    """Device that weights are loaded to, except for embeddings outside the blocks."""
    skipped_blocks: list[Block] = field(default_factory=list)
    """Blocks that are not quantized because a forward with text does not call them."""
    expert_layout: ExpertLayout = field(default_factory=dict)
    """Modules of experts that are separate layers, with the names of their projections."""
    warnings: list[str] = field(default_factory=list)
    """Warnings about the checkpoint, for the user."""
    _block_of: dict[str, int] = field(default_factory=dict)
    """Name of a tensor in the checkpoint -> index of its block."""
    maps: dict[str, mmap.mmap] = field(default_factory=dict)
    """Name of a module -> memory map of its loaded weight."""
    _outside: list[str] = field(default_factory=list)
    """Names of the modules outside the blocks."""
    _computed: list[tuple[nn.Module, str]] = field(default_factory=list)
    """(module, tensor) of everything in `_outside` that was loaded without a memory map."""

    def block_tensors(self, index: int) -> dict[str, TensorInfo]:
        """Returns the tensors of the checkpoint that belong to block `index`, by their names in it."""
        tensors = self.checkpoint.tensors
        return {name: tensors[name] for name, block in self._block_of.items() if block == index}

    def prefetch(self, index: int) -> None:
        """Asks the operating system to read block `index`, if there is one, in the background."""
        for info in self.block_tensors(index).values():
            info.prefetch()

    def other_tensors(self) -> dict[str, TensorInfo]:
        """Returns the tensors of the checkpoint that belong to no block, by name."""
        return {n: info for n, info in self.checkpoint.tensors.items() if n not in self._block_of}

    def ignored_modules(self) -> list[str]:
        """Returns the modules that only the files have, such as draft layers (MTP)."""
        used = self.checkpoint_name_of.values()
        return ignored_modules(self.model, self.checkpoint.tensors, used)

    def ignored_note(self) -> list[str]:
        """Returns a line that names the modules that only the files have; empty if there are none."""
        names = self.ignored_modules()
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        line = (
            f"{', '.join(names[:3])}{more} stay dense: transformers leaves them out (draft layers?); "
            "the config says so to engines"
        )
        return [line] if names else []

    def skip_blocks(self, blocks: list[Block]) -> None:
        """Moves blocks to `skipped_blocks`; they are handled like modules outside the blocks then."""
        self.skipped_blocks += blocks
        names = {block.name for block in blocks}
        self.blocks = [block for block in self.blocks if block.name not in names]
        self._block_of = dict(_blocks_of_tensors(self))

    def load(
        self, module: nn.Module, prefix: str, *, recurse: bool = True, aligned: bool = True
    ) -> None:
        """Loads the parameters and buffers of a module that are on the meta device.

        Args:
            module: the module.
            prefix: its full name.
            recurse: load the modules below it too.
            aligned: copy tensors that the file does not align; else they are mapped as they are.

        Raises:
            CheckpointError: a tensor cannot be read.
        """
        for owner, name, key in _named_tensors(module, prefix, recurse=recurse):
            current = owner._parameters.get(name, owner._buffers.get(name))
            device = HOST if _is_outer_embedding(owner, recurse=recurse) else self.device
            if (
                current is None
                or current.device.type != "meta"
                or key not in self.checkpoint_name_of
            ):
                if current is not None and not current.is_meta:  # computed, not in the checkpoint
                    if name in owner._buffers:
                        owner._buffers[name] = current.to(device)
                    else:
                        owner._parameters[name] = nn.Parameter(current.to(device), False)
                continue
            info = self.checkpoint.tensors[self.checkpoint_name_of[key]]
            value, view = info.memory_mapped(aligned=aligned and device == HOST)
            if view is not None and name == "weight" and device == HOST:
                self.maps[key.removesuffix(".weight")] = view
            if view is None and not aligned:
                self._computed.append((owner, name))
            value = value.to(device, current.dtype if value.is_floating_point() else None)
            if name in owner._parameters:
                owner._parameters[name] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[name] = value

    def release_pages(self, names: list[str] | None = None) -> None:
        """Releases the memory of mapped weights; they are read again from disk when they are used.

        Matrices outside the blocks without a memory map (transformed while being read) are moved back to
        the meta device instead; using one afterwards is an error.

        Args:
            names: names of modules; None: all outside the blocks, such as the embeddings once all
                batches have reached the first block.
        """
        for name in self._outside if names is None else names:
            if name in self.maps:
                self.maps[name].madvise(mmap.MADV_DONTNEED)
        for owner, name in self._computed if names is None else []:
            value = owner._parameters.get(name)
            if value is not None and value.ndim > 1:
                owner._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)
        if names is None:
            self._computed = []

    def load_outside_blocks(self) -> None:
        """Loads all modules outside the blocks, such as embeddings and norms, except the output head."""
        names = {block.name for block in self.blocks}
        head = self.model.get_output_embeddings()
        for path, owner in self.model.named_modules():
            inside = any(path == name or path.startswith(f"{name}.") for name in names)
            # The paused forward ends after the last block, so a head that is not a block is not called.
            is_head = owner is head and not isinstance(owner, nn.Embedding)
            if not inside and not is_head:
                self.load(owner, path, recurse=False, aligned=False)
                self._outside.append(path)
                if _is_outer_embedding(owner, recurse=False) and self.device != HOST:
                    keep_embedding_on_host(owner, self.device)

    def unload(self, module: nn.Module, prefix: str) -> None:
        """Moves what `load` has loaded back to the meta device and frees its memory.

        Args:
            module: the module.
            prefix: its full name.
        """
        for owner, name, key in _named_tensors(module, prefix):
            if key not in self.checkpoint_name_of:
                continue
            self.maps.pop(key.removesuffix(".weight"), None)
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
    """Builds the model of a checkpoint on the meta device and finds its blocks and tensors.

    Args:
        source: folder, GGUF file, or an open checkpoint.
        dtype: dtype to compute in; None: that of the config.
        lm_head: make the output head the last block, with its own weight.
        device: device that weights will be loaded to.

    Raises:
        CheckpointError: the architecture is unknown or needs custom code, or tensors are missing.
        ConfigError: the model has no repeated blocks with linear layers, or is quantized in an
            unsupported format.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_source(source)
    checkpoint, warnings = dequantized_checkpoint(checkpoint)
    config = load_config(checkpoint)
    dtype = dtype or _model_dtype(config, checkpoint)
    with limit_module_count(len(checkpoint.tensors)):
        model = build(config, dtype)
    checkpoint = converted_checkpoint(model, checkpoint)
    checkpoint, expert_layout = install_linear_experts(model, checkpoint)
    checkpoint_name_of = map_tensor_names(model, checkpoint)
    if lm_head:
        # The model is built again: tied parameters of a built model cannot be separated.
        if is_tied(config):
            untie(config)
            model = build(config, dtype)
            replace_fused_experts(model, expert_layout)
        checkpoint = untied_checkpoint(checkpoint, model, checkpoint_name_of)
    if computed := {*stored_tensors(model)} - {*checkpoint_name_of}:
        initialize_tensors(model, computed)
    blocks = find_blocks(model)
    _skip_shared_linears(blocks, checkpoint_name_of)
    if lm_head:
        blocks.append(head_block(model))
    streamed = StreamedModel(
        model, checkpoint, blocks, checkpoint_name_of, dtype, device,
        expert_layout=expert_layout, warnings=warnings,
    )  # fmt: skip
    streamed._block_of = dict(_blocks_of_tensors(streamed))
    return streamed


def _skip_shared_linears(blocks: list[Block], checkpoint_name_of: dict[str, str]) -> None:
    """Skips the linears of several blocks that share one weight: each would need codes of its own."""
    linears = [(block, name) for block in blocks for name in block.linears]
    uses = Counter(checkpoint_name_of[f"{name}.weight"] for _, name in linears)
    for block, name in linears:
        if uses[checkpoint_name_of[f"{name}.weight"]] > 1:
            del block.linears[name]
            block.skipped_linears[name] = "it shares its weight with a layer of another block"


def unfused_checkpoint(checkpoint: Checkpoint, layers: set[str], *, lm_head: bool) -> Checkpoint:
    """Returns a view with one weight per layer: fused experts are split, a tied head is untied.

    Args:
        checkpoint: the original.
        layers: names of the layers that need a weight; if all have one, the checkpoint is returned.
        lm_head: the output head is one of them.

    Raises:
        CheckpointError: as `open_streamed_model`.
        ConfigError: as `open_streamed_model`.
    """
    if all(f"{name}.weight" in checkpoint.tensors for name in layers):
        return checkpoint
    return open_streamed_model(checkpoint, lm_head=lm_head).checkpoint


def _is_outer_embedding(owner: nn.Module, *, recurse: bool) -> bool:
    """Tells whether a module is an embedding outside the blocks: only those are loaded singly."""
    return isinstance(owner, nn.Embedding) and not recurse


def _named_tensors(
    module: nn.Module, prefix: str, *, recurse: bool = True
) -> Iterator[tuple[nn.Module, str, str]]:
    """Yields (owner, local name, full name) of each parameter and buffer of a module and those below."""
    for path, owner in module.named_modules(prefix=prefix) if recurse else [(prefix, module)]:
        for name in [*owner._parameters, *owner._buffers]:
            yield owner, name, f"{path}.{name}" if path else name


def _model_dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """Returns the dtype that the model computes in: the config's, else that of its largest tensor."""
    text = text_config(config)
    for value in (getattr(config, "dtype", None), getattr(text, "dtype", None)):
        if value is not None:
            return parse_model_dtype(value)
    largest = max(checkpoint.tensors.values(), key=lambda info: info.nbytes)
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(largest.dtype, torch.float32)


def _blocks_of_tensors(streamed: StreamedModel) -> Iterator[tuple[str, int]]:
    """Yields (name in the checkpoint, block index) for every tensor of a block."""
    for name, key in streamed.checkpoint_name_of.items():
        for index, block in enumerate(streamed.blocks):
            if name.startswith(f"{block.name}."):
                yield key, index
