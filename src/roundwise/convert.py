"""From one checkpoint format to another, shard by shard: the same numbers, written otherwise.

A quantized checkpoint in either format, and the tensors of what it is turned into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from roundwise.checkpoint import compressed_tensors
from roundwise.checkpoint.compressed_tensors import PackedLayer
from roundwise.checkpoint.gptq_format import (
    SUFFIXES,
    QuantizedLayer,
    check_shape,
    config_from_settings,
    encode,
    quantized_layers,
    read_quantization_config,
    settings_from_weight,
)
from roundwise.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint, TensorInfo
from roundwise.checkpoint.untrusted import limit_module_count
from roundwise.checkpoint.writer import copy_file, write_json, write_safetensors
from roundwise.config import QuantizeConfig
from roundwise.core.quantized_weight import QuantizedWeight, pack
from roundwise.errors import ConfigError, OutputError
from roundwise.model.build import build, dtype_of, load_config
from roundwise.model.expert_weights import FusedExperts, fused_experts

Target = Literal["gptq", "gptq_v2", "compressed-tensors", "dense"]
TARGETS: tuple[Target, ...] = ("gptq", "gptq_v2", "compressed-tensors", "dense")
#: New tensors of a layer, by suffix.
Encoder = Callable[[QuantizedWeight], dict[str, torch.Tensor]]
#: Bytes of a shard of the result, about: what is in memory at a time.
SHARD = 1 << 30


def convert(source: Path, out: Path, to: Target, *, dtype: torch.dtype | None = None) -> Path:
    """Writes a quantized checkpoint in another format.

    Args:
        source: folder of a quantized checkpoint, by any tool: GPTQ, or compressed-tensors.
        out: new or empty folder.
        to: gptq (v1), gptq_v2, compressed-tensors (pack-quantized), or dense: dequantized, a plain
            checkpoint.
        dtype: of dequantized weights; None: what the model computes in.

    Returns:
        The folder `out`; its config.json is written last.

    Raises:
        CheckpointError: the source is in neither format, or damaged.
        ConfigError: what the source holds cannot be said in the target's format.
        OutputError: `out` holds something.
    """
    if to not in TARGETS:
        raise ConfigError(f"--to {to!r} is not supported: use {', '.join(TARGETS)}")
    if dtype is not None and to != "dense":
        raise ConfigError("--dtype is for --to dense: codes and scales stay as they are")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} already holds something: give an empty or new folder")
    checkpoint = Checkpoint(source)
    found = open_source(checkpoint)
    settings: dict[str, Any] | None = None
    if to == "dense":
        dtype = dtype or dtype_of(checkpoint.config) or torch.float16
        pieces = list(_dense(checkpoint, found, dtype))
    elif to == compressed_tensors.METHOD:
        pieces, settings = _as_compressed(checkpoint, found)
    elif found.version is not None:
        pieces = list(_zeros_as(checkpoint, found, to))
        settings = {**found.settings, "quant_method": "gptq", "checkpoint_format": to}
    else:
        assert to != "compressed-tensors"
        pieces, settings = _as_gptq(checkpoint, found, to)
    out.mkdir(parents=True, exist_ok=True)
    _write(out, pieces)
    for path in checkpoint.side_files():
        copy_file(path, out / path.name)
    config = {**checkpoint.config}
    config.pop("quantization_config", None)
    if settings is not None:
        config["quantization_config"] = settings
        if to != compressed_tensors.METHOD:
            write_json(out / "quantize_config.json", settings)
    write_json(out / "config.json", config)
    return out


def _model(checkpoint: Checkpoint) -> PreTrainedModel:
    with limit_module_count(len(checkpoint.tensors)):
        return build(load_config(checkpoint), torch.float32)


def _transposed_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the layers whose weights are stored the other way around."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, Conv1D))


def _left(model: PreTrainedModel, source: Source) -> list[str]:
    """Linear layers that are not quantized; the files may know them without the model's prefix."""
    base = f"{model.base_model_prefix}."
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not {name, name.removeprefix(base)} & {*source.layers}
    ]


def _encoded(
    source: Source, name: str, tensors: Encoder, suffixes: Sequence[str]
) -> Iterator[Piece]:
    """A layer's new tensors; what is made for the first of them serves the others."""
    nbytes = sum(part.nbytes for part in source.layers[name].parts.values())
    made: dict[str, torch.Tensor] = {}

    def make(suffix: str) -> torch.Tensor:
        if not made:
            made.update(tensors(source.read(name)))
        return made.pop(suffix)

    for suffix in suffixes:
        yield Piece(f"{name}.{suffix}", nbytes // len(suffixes), partial(make, suffix))


def _as_compressed(checkpoint: Checkpoint, source: Source) -> tuple[list[Piece], dict[str, Any]]:
    """The tensors of a compressed-tensors checkpoint, and its settings."""
    model = _model(checkpoint)
    transposed = _transposed_layers(model)
    schemes: dict[str, compressed_tensors.Scheme] = {}
    for name in source.layers:
        if any(path.endswith(name) for path in transposed):
            raise ConfigError(f"{name} is a Conv1D, which compressed-tensors does not know")
        schemes[name] = compressed_tensors.scheme_of(name, source.read(name))

    def pieces(name: str) -> Iterator[Piece]:
        sym = schemes[name].sym
        return _encoded(
            source,
            name,
            partial(compressed_tensors.encode, sym=sym),
            compressed_tensors.parts_of(sym),
        )

    settings = compressed_tensors.quantization_config(schemes, _left(model, source))
    return list(source.replaced(checkpoint, pieces)), settings


def _as_gptq(
    checkpoint: Checkpoint, source: Source, to: Literal["gptq", "gptq_v2"]
) -> tuple[list[Piece], dict[str, Any]]:
    """The tensors of a GPTQ checkpoint made from a compressed-tensors one, and its settings."""
    kinds: dict[str, dict[str, Any]] = {}
    for name in source.layers:
        q = source.read(name)
        kinds[name] = settings_from_weight(q)
        settings = QuantizeConfig(bits=q.bits, group_size=kinds[name]["group_size"])
        check_shape(name, *source.shape(name), settings)
        _check_zeros(name, q, to)

    def pieces(name: str) -> Iterator[Piece]:
        settings = QuantizeConfig(bits=kinds[name]["bits"], format=to)
        return _encoded(source, name, partial(encode, config=settings), SUFFIXES)

    model = _model(checkpoint)
    head = "lm_head"
    left = [name for name in _left(model, source) if name != head]
    settings_of = config_from_settings(kinds, to, left, lm_head=head in source.layers)
    return list(source.replaced(checkpoint, pieces)), settings_of


def _check_zeros(name: str, q: QuantizedWeight, to: str) -> None:
    """Raises ConfigError for what v1 cannot say."""
    if to == "gptq" and bool((q.zeros == 0).any()):
        raise ConfigError(
            f"{name} has a zero point of 0, which v1 stores as -1 and readers take for "
            f"{2**q.bits}: use gptq_v2"
        )


def _dense(checkpoint: Checkpoint, source: Source, dtype: torch.dtype) -> Iterator[Piece]:
    """Dequantized weights in place of codes; everything else byte for byte.

    Experts are joined again where transformers reads them in no other way.
    """
    model = _model(checkpoint)
    pieces = {piece.name: piece for piece in _apart(model, checkpoint, source, dtype)}
    for joint in fused_experts(model, checkpoint, {*source.layers}):
        members = {name: pieces.pop(name) for names in joint.members for name in names}

        nbytes = sum(member.nbytes for member in members.values())
        pieces[joint.name] = Piece(joint.name, nbytes, partial(_join, joint, members))
    yield from pieces.values()


def _join(joint: FusedExperts, members: dict[str, Piece]) -> torch.Tensor:
    return joint.make(lambda name: members[name].read())


def _apart(
    model: PreTrainedModel, checkpoint: Checkpoint, source: Source, dtype: torch.dtype
) -> Iterator[Piece]:
    """The tensors of a dense checkpoint, experts one by one."""
    transposed = _transposed_layers(model)

    def pieces(name: str) -> Iterator[Piece]:
        rows, columns = source.shape(name)

        def dequantized() -> torch.Tensor:
            W = source.read(name).dequantize(dtype)
            return W.T.contiguous() if any(path.endswith(name) for path in transposed) else W

        yield Piece(f"{name}.weight", rows * columns * dtype.itemsize, dequantized)

    return source.replaced(checkpoint, pieces)


def _zeros_as(checkpoint: Checkpoint, source: Source, to: str) -> Iterator[Piece]:
    """Zero points as version `to` stores them; everything else byte for byte."""
    for name, info in checkpoint.tensors.items():
        stem, _, suffix = name.rpartition(".")
        if stem not in source.layers or suffix != "qzeros" or source.version == to:
            yield as_is(name, info)
            continue

        def rewritten(stem: str = stem) -> torch.Tensor:
            q = source.read(stem)
            _check_zeros(stem, q, to)
            zeros = (q.zeros - 1) & (2**q.bits - 1) if to == "gptq" else q.zeros
            return pack(zeros, q.bits).T.contiguous()

        yield Piece(name, info.nbytes, rewritten)


def _write(out: Path, pieces: list[Piece]) -> None:
    """All pieces in shards of about SHARD bytes, and their index."""
    numbers, filled, total = [], 0, 0
    for piece in pieces:
        filled += piece.nbytes
        numbers.append((filled - 1) // SHARD if filled else 0)
    count = len(set(numbers))
    weight_map: dict[str, str] = {}
    shards = groupby(zip(numbers, pieces, strict=True), key=lambda pair: pair[0])
    for index, (_, shard) in enumerate(shards):
        file = SINGLE_FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        tensors = {piece.name: piece.make() for _, piece in shard}
        write_safetensors(out / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if count > 1:
        write_json(out / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


@dataclass(frozen=True)
class Piece:
    """A tensor of the result; made when it is its turn."""

    name: str
    nbytes: int
    """About."""
    make: Callable[[], torch.Tensor | TensorInfo]

    def read(self) -> torch.Tensor:
        """The tensor, in memory."""
        made = self.make()
        return made.read() if isinstance(made, TensorInfo) else made


def as_is(name: str, info: TensorInfo) -> Piece:
    """A tensor byte for byte."""
    return Piece(name, info.nbytes, lambda: info)


@dataclass(frozen=True)
class Source:
    """A quantized checkpoint in either format."""

    settings: dict[str, Any]
    version: str | None
    """gptq or gptq_v2; None: compressed-tensors."""
    layers: dict[str, QuantizedLayer | PackedLayer]

    def read(self, name: str) -> QuantizedWeight:
        """A layer's codes, scales and zero points."""
        layer = self.layers[name]
        return (
            layer.read(self.version or "gptq")
            if isinstance(layer, QuantizedLayer)
            else layer.read()
        )

    def shape(self, name: str) -> tuple[int, int]:
        """A layer's output and input channels."""
        layer = self.layers[name]
        if isinstance(layer, PackedLayer):
            return layer.shape()
        return layer.tensors["scales"].shape[1], layer.in_features()

    def replaced(
        self, checkpoint: Checkpoint, make: Callable[[str], Iterable[Piece]]
    ) -> Iterator[Piece]:
        """All tensors of the checkpoint: those of a layer as `make` has them, others as they are."""
        owner = {
            f"{name}.{part}": name for name, layer in self.layers.items() for part in layer.tensors
        }
        begun = set()
        for name, info in checkpoint.tensors.items():
            if name not in owner:
                yield as_is(name, info)
            elif owner[name] not in begun:
                begun.add(owner[name])
                yield from make(owner[name])


def open_source(checkpoint: Checkpoint) -> Source:
    """The layers of a checkpoint in whichever format it is.

    Raises:
        CheckpointError: it is in neither, or damaged.
        ConfigError: more than weights is quantized.
    """
    settings = checkpoint.config.get("quantization_config")
    if isinstance(settings, dict) and settings.get("quant_method") == compressed_tensors.METHOD:
        return Source(settings, None, {**compressed_tensors.packed_layers(checkpoint)})
    settings = read_quantization_config(checkpoint)
    layers = {layer.name: layer for layer in quantized_layers(checkpoint)}
    return Source(settings, settings.get("checkpoint_format", "gptq"), {**layers})
