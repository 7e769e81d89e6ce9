"""Converts a quantized checkpoint to another format, shard by shard, with the same codes and scales.

Sources are GPTQ checkpoints (v1 or v2) and compressed-tensors ones; targets are both, and dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from roundwise.checkpoint import compressed_tensors
from roundwise.checkpoint.gptq_format import (
    SUFFIXES,
    LayerSettings,
    config_from_settings,
    encode,
    settings_from_weight,
    shape_problem,
)
from roundwise.checkpoint.quantization_config import without_quantization_config
from roundwise.checkpoint.quantized_checkpoint import (
    LazyTensor,
    QuantizedCheckpoint,
    copied_tensor,
    open_quantized,
)
from roundwise.checkpoint.reader import Checkpoint, TensorInfo
from roundwise.checkpoint.sharding import divide_into_shards, write_index
from roundwise.checkpoint.untrusted import limit_module_count
from roundwise.checkpoint.writer import copy_side_files, write_json, write_safetensors
from roundwise.config import QuantizeConfig
from roundwise.core.quantized_weight import QuantizedWeight, pack
from roundwise.errors import ConfigError, OutputError
from roundwise.model.blocks import check_quantized_head
from roundwise.model.build import build, config_dtype, load_config
from roundwise.model.expert_weights import FusedExpertTensor, fused_expert_tensors

Target = Literal["gptq", "gptq_v2", "compressed-tensors", "dense"]
TARGETS: tuple[Target, ...] = ("gptq", "gptq_v2", "compressed-tensors", "dense")
#: Returns a layer's tensors in the target format, by suffix.
Encoder = Callable[[QuantizedWeight], dict[str, torch.Tensor]]
#: Approximate bytes of a shard of the result; fewer than a run's, because a shard is whole in memory.
SHARD_BYTES = 1 << 30


def convert(source: Path, out: Path, to: Target, *, dtype: torch.dtype | None = None) -> Path:
    """Writes a quantized checkpoint in another format.

    Args:
        source: folder of a quantized checkpoint of any tool, in GPTQ or compressed-tensors format.
        out: new or empty folder.
        to: gptq (v1), gptq_v2, compressed-tensors (pack-quantized), or dense (a plain checkpoint with
            dequantized weights).
        dtype: dtype of dequantized weights; None: that of the model's config.

    Returns:
        The folder `out`; its config.json is written last.

    Raises:
        CheckpointError: the source is in neither format, or damaged.
        ConfigError: the target's format cannot express the source, or an argument is invalid.
        OutputError: `out` is not empty.
        StorageError: the disk is full or failed.
    """
    if to not in TARGETS:
        raise ConfigError(f"--to {to!r} is not supported: use {', '.join(TARGETS)}")
    if dtype is not None and to != "dense":
        raise ConfigError("--dtype is only for --to dense: codes and scales keep their types")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is not empty: choose an empty or new folder")
    checkpoint = Checkpoint(source)
    quantized = open_quantized(checkpoint)
    check_quantized_head(lambda: load_config(checkpoint), quantized.layers)
    settings: dict[str, Any] | None = None
    if to == "dense":
        dtype = dtype or config_dtype(checkpoint.config) or torch.float16
        tensors = list(_to_dense(checkpoint, quantized, dtype))
    elif to == "compressed-tensors":
        tensors, settings = _to_compressed_tensors(checkpoint, quantized)
    elif quantized.config is not None:
        version = quantized.config.checkpoint_format
        tensors = list(_rewrite_zero_points(checkpoint, quantized, to, unchanged=version == to))
        settings = quantized.config.as_json(to)
    else:
        tensors, settings = _to_gptq(checkpoint, quantized, to)
    out.mkdir(parents=True, exist_ok=True)
    _write_shards(out, tensors)
    copy_side_files(checkpoint, out)
    config = without_quantization_config(checkpoint.config)
    if settings is not None:
        config["quantization_config"] = settings
        if to != "compressed-tensors":
            write_json(out / "quantize_config.json", settings)
    write_json(out / "config.json", config)
    return out


def _build_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Returns the model of a checkpoint on the meta device, with transformers' own modules."""
    with limit_module_count(len(checkpoint.tensors)):
        return build(load_config(checkpoint), torch.float32)


def _conv1d_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Returns the names of the Conv1D layers, whose weights are stored as [in, out]."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, Conv1D))


def _unquantized_linears(model: PreTrainedModel, quantized: QuantizedCheckpoint) -> list[str]:
    """Returns the names of linear layers that are not quantized.

    The files may have a layer's name without the prefix of the base model.
    """
    base = f"{model.base_model_prefix}."
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not {name, name.removeprefix(base)} & {*quantized.layers}
    ]


def _encode_layer(
    quantized: QuantizedCheckpoint, name: str, encoder: Encoder, suffixes: Sequence[str]
) -> Iterator[LazyTensor]:
    """Yields a layer's tensors in the target format; the first one computed computes them all.

    Args:
        quantized: the source.
        name: name of the layer.
        encoder: returns the layer's tensors by suffix.
        suffixes: the suffixes.
    """
    nbytes = sum(info.nbytes for info in quantized.layers[name].tensors.values())
    encoded: dict[str, torch.Tensor] = {}

    def compute(suffix: str) -> torch.Tensor:
        if not encoded:
            encoded.update(encoder(quantized.read(name)))
        return encoded.pop(suffix)

    for suffix in suffixes:
        yield LazyTensor(f"{name}.{suffix}", nbytes // len(suffixes), partial(compute, suffix))


def _to_compressed_tensors(
    checkpoint: Checkpoint, quantized: QuantizedCheckpoint
) -> tuple[list[LazyTensor], dict[str, Any]]:
    """Returns the tensors of a compressed-tensors checkpoint and its quantization_config."""
    model = _build_model(checkpoint)
    conv1d_names = _conv1d_names(model)
    schemes: dict[str, compressed_tensors.Scheme] = {}
    for name in quantized.layers:
        if any(path.endswith(name) for path in conv1d_names):
            raise ConfigError(f"{name} is a Conv1D, which compressed-tensors does not support")
        schemes[name] = compressed_tensors.scheme_from_weight(name, quantized.read(name))

    def convert_layer(name: str) -> Iterator[LazyTensor]:
        sym = schemes[name].sym
        encoder = partial(compressed_tensors.encode, sym=sym)
        return _encode_layer(quantized, name, encoder, compressed_tensors.suffixes(sym=sym))

    settings = compressed_tensors.quantization_config(
        schemes, _unquantized_linears(model, quantized)
    )
    return list(quantized.replace_layers(checkpoint, convert_layer)), settings


def _to_gptq(
    checkpoint: Checkpoint, quantized: QuantizedCheckpoint, to: Literal["gptq", "gptq_v2"]
) -> tuple[list[LazyTensor], dict[str, Any]]:
    """Returns tensors and quantization_config of a GPTQ checkpoint from a compressed-tensors one."""
    layers: dict[str, LayerSettings] = {}
    for name in quantized.layers:
        q = quantized.read(name)
        layers[name] = settings_from_weight(q)
        config = QuantizeConfig(bits=q.bits, group_size=layers[name].group_size)
        problem = shape_problem(*quantized.shape(name), config)
        if problem:
            raise ConfigError(f"{name}: {problem}")
        _check_zero_points(name, q, to)

    def convert_layer(name: str) -> Iterator[LazyTensor]:
        config = QuantizeConfig(bits=layers[name].bits, format=to)
        return _encode_layer(quantized, name, partial(encode, config=config), SUFFIXES)

    model = _build_model(checkpoint)
    head = "lm_head"
    unquantized = [name for name in _unquantized_linears(model, quantized) if name != head]
    settings = config_from_settings(layers, to, unquantized, lm_head=head in quantized.layers)
    return list(quantized.replace_layers(checkpoint, convert_layer)), settings


def _check_zero_points(name: str, q: QuantizedWeight, to: str) -> None:
    """Raises ConfigError for a zero point of 0 in a v1 file."""
    if to == "gptq" and bool((q.zeros == 0).any()):
        raise ConfigError(
            f"{name} has a zero point of 0, which v1 stores as -1 and readers take for "
            f"{2**q.bits}: use gptq_v2"
        )


def _to_dense(
    checkpoint: Checkpoint, quantized: QuantizedCheckpoint, dtype: torch.dtype
) -> Iterator[LazyTensor]:
    """Yields the tensors of a dense checkpoint: weights in place of codes, all others unchanged.

    Experts are fused again if transformers reads them only fused.
    """
    model = _build_model(checkpoint)
    tensors = {t.name: t for t in _dequantize_layers(model, checkpoint, quantized, dtype)}
    for fused in fused_expert_tensors(model, quantized.layers):
        members = {name: tensors.pop(name) for names in fused.members for name in names}
        nbytes = sum(member.nbytes for member in members.values())
        tensors[fused.name] = LazyTensor(fused.name, nbytes, partial(_fuse, fused, members))
    yield from tensors.values()


def _fuse(fused: FusedExpertTensor, members: dict[str, LazyTensor]) -> torch.Tensor:
    """Returns the fused tensor of some members."""
    return fused.assemble(lambda name: members[name].read())


def _dequantize_layers(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    quantized: QuantizedCheckpoint,
    dtype: torch.dtype,
) -> Iterator[LazyTensor]:
    """Yields the checkpoint's tensors with a dequantized weight per layer; experts stay separate."""
    conv1d_names = _conv1d_names(model)

    def convert_layer(name: str) -> Iterator[LazyTensor]:
        rows, columns = quantized.shape(name)

        def dequantize() -> torch.Tensor:
            W = quantized.read(name).dequantize(dtype)
            return W.T.contiguous() if any(path.endswith(name) for path in conv1d_names) else W

        yield LazyTensor(f"{name}.weight", rows * columns * dtype.itemsize, dequantize)

    return quantized.replace_layers(checkpoint, convert_layer)


def _rewrite_zero_points(
    checkpoint: Checkpoint, quantized: QuantizedCheckpoint, to: str, *, unchanged: bool
) -> Iterator[LazyTensor]:
    """Yields the tensors of a GPTQ checkpoint with zero points as version `to` stores them.

    Args:
        checkpoint: the checkpoint.
        quantized: its quantized layers; each one is read, so that no damaged one is copied.
        to: gptq or gptq_v2.
        unchanged: zero points are stored in this way already.
    """
    for name, info in checkpoint.tensors.items():
        layer_name, _, suffix = name.rpartition(".")
        if layer_name not in quantized.layers or suffix != "qzeros":
            yield copied_tensor(name, info)
            continue

        def compute(
            layer_name: str = layer_name, info: TensorInfo = info
        ) -> torch.Tensor | TensorInfo:
            q = quantized.read(layer_name)
            if unchanged:
                return info
            _check_zero_points(layer_name, q, to)
            zeros = (q.zeros - 1) & (2**q.bits - 1) if to == "gptq" else q.zeros
            return pack(zeros, q.bits).T.contiguous()

        yield LazyTensor(name, info.nbytes, compute)


def _write_shards(out: Path, tensors: list[LazyTensor]) -> None:
    """Writes all tensors in shards of about `SHARD_BYTES`, and the index of several shards."""
    shards = divide_into_shards([tensor.nbytes for tensor in tensors], SHARD_BYTES)
    for file, parts in shards.items():
        computed = {tensors[index].name: tensors[index].compute() for index in parts}
        write_safetensors(out / file, computed)
    write_index(out, [*shards])
