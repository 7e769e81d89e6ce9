"""Converts a quantized checkpoint to another format, shard by shard, with the same codes and scales.

Sources are GPTQ checkpoints (v1 or v2) and compressed-tensors ones; targets are both, and dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from roundwise.checkpoint import compressed_tensors
from roundwise.checkpoint.formats import COMPRESSED_TENSORS, shape_problem
from roundwise.checkpoint.gptq_format import (
    SUFFIXES,
    LayerSettings,
    config_from_settings,
    encode,
    settings_from_weight,
)
from roundwise.checkpoint.quantization_config import (
    read_quantization_config,
    without_quantization_config,
)
from roundwise.checkpoint.quantized_layers import QuantizedLayer, find_layers
from roundwise.checkpoint.reader import Checkpoint, TensorInfo
from roundwise.checkpoint.sharding import divide_into_shards, write_index
from roundwise.checkpoint.untrusted import limit_module_count
from roundwise.checkpoint.writer import (
    LazyTensor,
    copied_tensor,
    copy_side_files,
    write_json,
    write_safetensors,
)
from roundwise.config import QuantizeConfig
from roundwise.core.quantized_weight import QuantizedWeight, pack
from roundwise.errors import CheckpointError, ConfigError, OutputError
from roundwise.model.blocks import HEADS, check_quantized_head, quantized_head
from roundwise.model.build import build, config_dtype, load_config
from roundwise.model.conversions import dense_layers, ignored_modules
from roundwise.model.expert_weights import FusedExpertTensor, fused_expert_tensors
from roundwise.system.activity import announce

Target = Literal["gptq", "gptq_v2", "compressed-tensors", "dense"]
TARGETS: tuple[Target, ...] = ("gptq", "gptq_v2", "compressed-tensors", "dense")
#: Returns a layer's tensors in the target format, by suffix.
Encoder = Callable[[QuantizedWeight], dict[str, torch.Tensor]]
#: Quantized layers by name.
Layers = dict[str, QuantizedLayer]
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
        raise ConfigError(f"--to {to!r} is not supported: use {', '.join(TARGETS)} or gguf")
    if dtype is not None and to != "dense":
        raise ConfigError("--dtype is only for --to dense: codes and scales keep their types")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is not empty: choose an empty or new folder")
    checkpoint = Checkpoint(source)
    stated = read_quantization_config(checkpoint)
    layers = {layer.name: layer for layer in find_layers(checkpoint.tensors, stated)}
    if not layers:
        raise CheckpointError(f"{source} has no quantized layers")
    check_quantized_head(lambda: load_config(checkpoint), layers)
    settings: dict[str, Any] | None = None
    if to == "dense":
        dtype = dtype or config_dtype(checkpoint.config) or torch.float16
        tensors = list(_to_dense(checkpoint, layers, dtype))
    elif to == "compressed-tensors":
        tensors, settings = _to_compressed_tensors(checkpoint, layers)
    elif stated.checkpoint_format != COMPRESSED_TENSORS:
        unchanged = stated.checkpoint_format == to
        tensors = list(_rewrite_zero_points(checkpoint, layers, to, unchanged=unchanged))
        settings = stated.as_json(to)
    else:
        tensors, settings = _to_gptq(checkpoint, layers, to)
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


def _replace_layers(
    checkpoint: Checkpoint, layers: Layers, convert_layer: Callable[[str], Iterable[LazyTensor]]
) -> Iterator[LazyTensor]:
    """Yields all tensors of a checkpoint, with those of the quantized layers replaced.

    Args:
        checkpoint: the checkpoint.
        layers: its quantized layers.
        convert_layer: returns the new tensors of a layer, from its name; called once per layer.
    """
    layer_of = {
        f"{name}.{suffix}": name for name, layer in layers.items() for suffix in layer.tensors
    }
    converted = set()
    for name, info in checkpoint.tensors.items():
        if name not in layer_of:
            yield copied_tensor(name, info)
        elif layer_of[name] not in converted:
            converted.add(layer_of[name])
            yield from convert_layer(layer_of[name])


def _encode_layer(
    layer: QuantizedLayer, encoder: Encoder, suffixes: Sequence[str]
) -> Iterator[LazyTensor]:
    """Yields a layer's tensors in the target format; the first one computed computes them all.

    Args:
        layer: the layer.
        encoder: returns the layer's tensors by suffix.
        suffixes: the suffixes.
    """
    nbytes = sum(info.nbytes for info in layer.tensors.values())
    encoded: dict[str, torch.Tensor] = {}

    def compute(suffix: str) -> torch.Tensor:
        if not encoded:
            encoded.update(encoder(layer.read()))
        return encoded.pop(suffix)

    for suffix in suffixes:
        yield LazyTensor(
            f"{layer.name}.{suffix}", nbytes // len(suffixes), partial(compute, suffix)
        )


def _to_compressed_tensors(
    checkpoint: Checkpoint, layers: Layers
) -> tuple[list[LazyTensor], dict[str, Any]]:
    """Returns the tensors of a compressed-tensors checkpoint and its quantization_config."""
    model = _build_model(checkpoint)
    conv1d_names = _conv1d_names(model)
    schemes: dict[str, compressed_tensors.Scheme] = {}
    for name, layer in layers.items():
        if any(path.endswith(name) for path in conv1d_names):
            raise ConfigError(f"{name} is a Conv1D, which compressed-tensors does not support")
        schemes[name] = compressed_tensors.scheme_from_weight(name, layer.read())

    def convert_layer(name: str) -> Iterator[LazyTensor]:
        sym = schemes[name].sym
        encoder = partial(compressed_tensors.encode, sym=sym)
        return _encode_layer(layers[name], encoder, compressed_tensors.suffixes(sym=sym))

    settings = compressed_tensors.quantization_config(
        schemes, dense_layers(model, checkpoint.tensors, layers),
        ignored=_ignored_modules(model, checkpoint, layers), head=quantized_head(layers),
    )  # fmt: skip
    return list(_replace_layers(checkpoint, layers, convert_layer)), settings


def _to_gptq(
    checkpoint: Checkpoint, layers: Layers, to: Literal["gptq", "gptq_v2"]
) -> tuple[list[LazyTensor], dict[str, Any]]:
    """Returns tensors and quantization_config of a GPTQ checkpoint from a compressed-tensors one."""
    found: dict[str, LayerSettings] = {}
    for name, layer in layers.items():
        q = _with_half_scales(layer)
        found[name] = settings_from_weight(q)
        config = QuantizeConfig(bits=q.bits, group_size=found[name].group_size)
        problem = shape_problem(layer.out_features, layer.in_features, config)
        if problem:
            raise ConfigError(f"{name}: {problem}")
        _check_zero_points(name, q, to)

    def convert_layer(name: str) -> Iterator[LazyTensor]:
        config = QuantizeConfig(bits=found[name].bits, format=to)
        return _encode_layer(
            layers[name], lambda _: encode(_with_half_scales(layers[name]), config), SUFFIXES
        )

    model, head = _build_model(checkpoint), quantized_head(layers)
    unquantized = [
        name for name in dense_layers(model, checkpoint.tensors, layers) if name not in HEADS
    ]
    settings = config_from_settings(
        found, to, unquantized, ignored=_ignored_modules(model, checkpoint, layers),
        lm_head=head is not None,
    )  # fmt: skip
    return list(_replace_layers(checkpoint, layers, convert_layer)), settings


def _ignored_modules(model: PreTrainedModel, checkpoint: Checkpoint, layers: Layers) -> list[str]:
    """Returns the modules that only the files have, such as draft layers."""
    packed = [f"{name}.{suffix}" for name, layer in layers.items() for suffix in layer.tensors]
    return ignored_modules(model, checkpoint.tensors, packed)


def _with_half_scales(layer: QuantizedLayer) -> QuantizedWeight:
    """Returns the layer's weight with scales as float16, the type of the GPTQ format.

    Raises:
        ConfigError: float16 cannot represent the scales exactly.
    """
    q = layer.read()
    scales = q.scales.to(torch.float16)
    if not torch.equal(scales.to(torch.float32), q.scales.to(torch.float32)):
        raise ConfigError(
            f"{layer.name} has scales that float16, the type of the GPTQ format, cannot hold exactly"
        )
    return replace(q, scales=scales)


def _check_zero_points(name: str, q: QuantizedWeight, to: str) -> None:
    """Raises ConfigError for a zero point of 0 in a v1 file."""
    if to == "gptq" and bool((q.zeros == 0).any()):
        raise ConfigError(
            f"{name} has a zero point of 0, which v1 stores as -1 and readers take for "
            f"{2**q.bits}: use gptq_v2"
        )


def _to_dense(checkpoint: Checkpoint, layers: Layers, dtype: torch.dtype) -> Iterator[LazyTensor]:
    """Yields the tensors of a dense checkpoint: weights in place of codes, all others unchanged.

    Experts are fused again if transformers reads them only fused.
    """
    model = _build_model(checkpoint)
    tensors = {t.name: t for t in _dequantize_layers(model, checkpoint, layers, dtype)}
    for fused in fused_expert_tensors(model, layers):
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
    layers: Layers,
    dtype: torch.dtype,
) -> Iterator[LazyTensor]:
    """Yields the checkpoint's tensors with a dequantized weight per layer; experts stay separate."""
    conv1d_names = _conv1d_names(model)

    def convert_layer(name: str) -> Iterator[LazyTensor]:
        layer = layers[name]

        def dequantize() -> torch.Tensor:
            W = layer.read().dequantize(dtype)
            return W.T.contiguous() if any(path.endswith(name) for path in conv1d_names) else W

        nbytes = layer.out_features * layer.in_features * dtype.itemsize
        yield LazyTensor(f"{name}.weight", nbytes, dequantize)

    return _replace_layers(checkpoint, layers, convert_layer)


def _rewrite_zero_points(
    checkpoint: Checkpoint, layers: Layers, to: str, *, unchanged: bool
) -> Iterator[LazyTensor]:
    """Yields the tensors of a GPTQ checkpoint with zero points as version `to` stores them.

    Args:
        checkpoint: the checkpoint.
        layers: its quantized layers; each one is read, so that no damaged one is copied.
        to: gptq or gptq_v2.
        unchanged: zero points are stored in this way already.
    """
    for name, info in checkpoint.tensors.items():
        layer_name, _, suffix = name.rpartition(".")
        if layer_name not in layers or suffix != "qzeros":
            yield copied_tensor(name, info)
            continue

        def compute(
            layer_name: str = layer_name, info: TensorInfo = info
        ) -> torch.Tensor | TensorInfo:
            q = layers[layer_name].read()
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
        computed = {}
        for index in parts:
            announce("writing tensors", index, len(tensors))
            computed[tensors[index].name] = tensors[index].compute()
        write_safetensors(out / file, computed)
    write_index(out, [*shards])
