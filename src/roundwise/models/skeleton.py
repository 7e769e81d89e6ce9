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
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from roundwise.errors import CheckpointError, ConfigError, RoundwiseError
from roundwise.models.bounds import bounded_modules, check_computed, dtype_named
from roundwise.models.checkpoint import Checkpoint, TensorInfo
from roundwise.models.experts import LinearExperts
from roundwise.models.split import Layout, routers_of, split_experts


@dataclass
class Block:
    """One of the repeated blocks."""

    name: str
    """Prefix of its modules, such as model.layers.3."""
    module: nn.Module
    linears: dict[str, nn.Module]
    """Full module name -> nn.Linear or Conv1D, in order of definition."""
    left: dict[str, str] = field(default_factory=dict)
    """Full name of linears that are never quantized, and what they are."""

    @property
    def experts(self) -> dict[str, LinearExperts]:
        """Full module name -> mixture of experts."""
        modules = self.module.named_modules(prefix=self.name)
        return {name: module for name, module in modules if isinstance(module, LinearExperts)}


@dataclass
class Skeleton:
    """A model on the meta device and the map from its tensors to the checkpoint's."""

    model: transformers.PreTrainedModel
    checkpoint: Checkpoint
    blocks: list[Block]
    source_of: dict[str, str]
    """Name of a parameter or buffer in the model -> name of the tensor in the checkpoint."""
    dtype: torch.dtype
    layout: Layout = field(default_factory=dict)
    """Where there are experts, and what their projections are called."""
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

    def other_tensors(self) -> dict[str, TensorInfo]:
        """The tensors of the checkpoint outside all blocks."""
        return {n: info for n, info in self.checkpoint.tensors.items() if n not in self._block_of}

    def load(
        self, module: nn.Module, prefix: str, *, recurse: bool = True, aligned: bool = True
    ) -> None:
        """Gives the meta parameters and buffers of `module` (named `prefix`) their values.

        Unless `aligned`, tensors are mapped even if their place in the file is not aligned.
        """
        for owner, name, key in _tensors_of(module, prefix, recurse=recurse):
            current = owner._parameters.get(name, owner._buffers.get(name))
            if current is None or current.device.type != "meta" or key not in self.source_of:
                continue
            info = self.checkpoint.tensors[self.source_of[key]]
            value, view = info.mapped(aligned=aligned)
            if view is not None and name == "weight":
                self._maps[key.removesuffix(".weight")] = view
            if view is None and not aligned:
                self._computed.append((owner, name))
            if value.is_floating_point():
                value = value.to(current.dtype)
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
            # The paused forward ends behind the last block: the head is never reached.
            if not inside and owner is not head:
                self.load(owner, path, recurse=False, aligned=False)
                self._outside.append(path)

    def unload(self, module: nn.Module, prefix: str) -> None:
        """Puts what `load` gave back on the meta device, freeing its memory."""
        for owner, name, key in _tensors_of(module, prefix):
            if key not in self.source_of:
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


def open_skeleton(
    source: str | os.PathLike[str] | Checkpoint, *, dtype: torch.dtype | None = None
) -> Skeleton:
    """Builds the model of a checkpoint on the meta device and maps its tensors.

    Args:
        source: folder, or a checkpoint that is open already.
        dtype: what the model is to compute in instead of what its config says.

    Raises:
        CheckpointError: the architecture is unknown, needs its own code, or tensors are missing.
        ConfigError: the model has no repeated blocks with linear layers, or is quantized already.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    if "quantization_config" in checkpoint.config:
        settings = checkpoint.config["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise ConfigError(
            f"{checkpoint.folder} is quantized already ({method or 'unknown'}): start from the original"
        )
    config = load_config(checkpoint)
    dtype = dtype or _model_dtype(config, checkpoint)
    with bounded_modules(len(checkpoint.tensors)):
        model = build(config, dtype)
    checkpoint, layout = split_experts(model, checkpoint)
    blocks = find_blocks(model)
    skeleton = Skeleton(model, checkpoint, blocks, _map_names(model, checkpoint), dtype, layout)
    skeleton._block_of = dict(_blocks_of_tensors(skeleton))
    return skeleton


def as_split(checkpoint: Checkpoint, layers: set[str]) -> Checkpoint:
    """The checkpoint with a tensor for each expert, if `layers` names some that it has no weight of."""
    if all(f"{name}.weight" in checkpoint.tensors for name in layers):
        return checkpoint
    return open_skeleton(checkpoint).checkpoint


def load_config(checkpoint: Checkpoint) -> Any:
    """Transformers' config of a checkpoint; code that comes with the model is never run."""
    try:
        return transformers.AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=False, **checkpoint.overrides
        )
    except Exception as error:  # transformers raises many kinds here; all mean the same to a user
        kind = checkpoint.config.get("model_type", "no model_type")
        reason = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot open {checkpoint.folder} ({kind}): {reason}"
        ) from error


def build(config: Any, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model on the meta device, only its computed buffers (rotary tables, masks) real."""
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False
            )
    except RoundwiseError:
        raise
    except Exception as error:  # many kinds for one reason: a config that makes no sense
        reason = str(error).strip().split("\n", 1)[0]
        kind = config.model_type
        if isinstance(error, ValueError):
            raise ConfigError(f"{kind} is no causal language model: {reason}") from error
        raise CheckpointError(
            f"transformers cannot build the {kind} of config.json: {reason}"
        ) from error
    check_computed(model)
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    for name, module in model.named_modules():
        fresh = False
        for key, buffer in module._buffers.items():
            if buffer is not None and f"{name}.{key}".lstrip(".") in computed:
                module._buffers[key] = torch.empty_like(buffer, device="cpu")
                fresh = True
        # transformers fills computed buffers in its own initialisation; let it see only these.
        module._is_hf_initialized = not fresh
    model.initialize_weights()
    return model.eval()


def find_blocks(model: nn.Module) -> list[Block]:
    """The repeated blocks: the outermost ModuleList that holds most linear weights.

    Raises:
        ConfigError: there is none.
    """
    best, best_size = "", 0
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            lists[name] = module
            size = sum(linear.weight.numel() for _, linear in _linears(module))
            if size > best_size:
                best, best_size = name, size
    if not best:
        raise ConfigError(
            f"{type(model).__name__} has no repeated blocks with linear layers: nothing to quantize"
        )
    return [_block(f"{best}.{i}", module) for i, module in enumerate(lists[best])]


def _block(name: str, module: nn.Module) -> Block:
    left = {f"{name}.{n}": reason for n, reason in routers_of(module).items()}
    linears = {f"{name}.{n}": linear for n, linear in _linears(module)}
    return Block(name, module, {n: linear for n, linear in linears.items() if n not in left}, left)


def weight_of(linear: nn.Module) -> torch.Tensor:
    """The weight as [out, in]; Conv1D keeps it as [in, out]."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(linear, Conv1D) else weight


def set_weight(linear: nn.Module, W: torch.Tensor) -> None:
    """Replaces the weight by W [out, in] in the dtype it had."""
    dtype = weight_of(linear).dtype
    value = W.T.contiguous() if isinstance(linear, Conv1D) else W
    linear.weight = nn.Parameter(value.to(dtype), requires_grad=False)


def _linears(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            yield name, child


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
            return dtype_named(value)
    largest = max(checkpoint.tensors.values(), key=lambda info: info.nbytes)
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(largest.dtype, torch.float32)


def _map_names(model: transformers.PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Model tensor name -> checkpoint tensor name.

    Old names and missing base prefixes (GPT-2's `h.0…` for `transformer.h.0…`) are translated by
    transformers; tied parameters may be stored under any of their names.

    Raises:
        CheckpointError: a tensor that the model needs is missing, or has another shape.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    names = dict(model.named_parameters(remove_duplicate=False))
    names |= {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in computed}
    stored: dict[str, str] = {}
    for key in checkpoint.tensors:
        name, converter = rename_source_key(
            key, renamings, converters, model.base_model_prefix, names
        )
        if converter is not None:  # experts that were split need no conversion
            name = rename_source_key(key, renamings, [], model.base_model_prefix, names)[0]
        stored[name] = key
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    partners: dict[str, list[str]] = {}
    for left, right in ties.items():
        partners.setdefault(left, []).append(right)
        partners.setdefault(right, []).append(left)
    found: dict[str, str] = {}
    missing = []
    for name in names:
        match = next((stored[n] for n in [name, *partners.get(name, [])] if n in stored), None)
        if match is None:
            missing.append(name)
            continue
        found[name] = match
        has, wants = checkpoint.tensors[match].shape, tuple(names[name].shape)
        if has != wants:
            raise CheckpointError(
                f"tensor {match} has shape {list(has)}; the model's config asks for {list(wants)}"
            )
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{checkpoint.folder} lacks {', '.join(missing[:3])}{more}, which "
            f"{type(model).__name__} of transformers {transformers.__version__} needs"
        )
    return found


def _blocks_of_tensors(skeleton: Skeleton) -> Iterator[tuple[str, int]]:
    """(checkpoint tensor, block index) for every tensor that a block loads."""
    for name, key in skeleton.source_of.items():
        for index, block in enumerate(skeleton.blocks):
            if name.startswith(f"{block.name}."):
                yield key, index
