"""From one checkpoint format to another, shard by shard: the same numbers, written otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from roundwise.core.packing import pack
from roundwise.errors import ConfigError, OutputError
from roundwise.models.architecture import build, dtype_of, load_config
from roundwise.models.bounds import bounded_modules
from roundwise.models.checkpoint import INDEX, SINGLE, Checkpoint, TensorInfo
from roundwise.models.formats import (
    SUFFIXES,
    QuantizedLayer,
    quantization_settings,
    quantized_layers,
)
from roundwise.models.split import Joint, joints
from roundwise.models.writer import copy_file, write_json, write_safetensors

Target = Literal["gptq", "gptq_v2", "dense"]
TARGETS: tuple[Target, ...] = ("gptq", "gptq_v2", "dense")
#: Bytes of a shard of the result, about: what is in memory at a time.
SHARD = 1 << 30


@dataclass(frozen=True)
class Piece:
    """A tensor of the result; made when it is its turn."""

    name: str
    nbytes: int
    make: Callable[[], torch.Tensor | TensorInfo]

    def read(self) -> torch.Tensor:
        """The tensor, in memory."""
        made = self.make()
        return made.read() if isinstance(made, TensorInfo) else made


def convert(source: Path, out: Path, to: Target, *, dtype: torch.dtype | None = None) -> Path:
    """Writes a GPTQ checkpoint in another format.

    Args:
        source: folder of a quantized checkpoint, by any tool.
        out: new or empty folder.
        to: gptq (v1), gptq_v2, or dense: dequantized, a plain checkpoint.
        dtype: of dequantized weights; None: what the model computes in.

    Returns:
        The folder `out`; its config.json is written last.

    Raises:
        CheckpointError: the source is not a GPTQ checkpoint, or damaged.
        ConfigError: what the source holds cannot be said in the target's format.
        OutputError: `out` holds something.
    """
    if to not in TARGETS:
        raise ConfigError(f"--to {to!r} is not supported: use {', '.join(TARGETS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} already holds something: give an empty or new folder")
    checkpoint = Checkpoint(source)
    settings = quantization_settings(checkpoint)
    before = settings.get("checkpoint_format", "gptq")
    layers = {layer.name: layer for layer in quantized_layers(checkpoint)}
    config = {**checkpoint.config}
    config.pop("quantization_config", None)
    if to == "dense":
        dtype = dtype or dtype_of(checkpoint.config) or torch.float16
        pieces = _dense(checkpoint, layers, before, dtype)
    else:
        if dtype is not None:
            raise ConfigError("--dtype is for --to dense: codes and scales stay as they are")
        pieces = _zeros_as(checkpoint, layers, before, to)
        config["quantization_config"] = {
            **settings, "quant_method": "gptq", "checkpoint_format": to
        }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    _write(out, list(pieces))
    for path in checkpoint.side_files():
        copy_file(path, out / path.name)
    if "quantization_config" in config:
        write_json(out / "quantize_config.json", config["quantization_config"])
    write_json(out / "config.json", config)
    return out


def _as_is(name: str, info: TensorInfo) -> Piece:
    return Piece(name, info.nbytes, lambda: info)


def _dense(
    checkpoint: Checkpoint, layers: dict[str, QuantizedLayer], before: str, dtype: torch.dtype
) -> Iterator[Piece]:
    """Dequantized weights in place of codes; everything else byte for byte.

    Experts are joined again where transformers reads them in no other way.
    """
    with bounded_modules(len(checkpoint.tensors)):
        model = build(load_config(checkpoint), torch.float32)
    pieces = {piece.name: piece for piece in _apart(model, checkpoint, layers, before, dtype)}
    for joint in joints(model, checkpoint, {*layers}):
        members = {name: pieces.pop(name) for names in joint.members for name in names}

        nbytes = sum(member.nbytes for member in members.values())
        pieces[joint.name] = Piece(joint.name, nbytes, partial(_join, joint, members))
    yield from pieces.values()


def _join(joint: Joint, members: dict[str, Piece]) -> torch.Tensor:
    return joint.make(lambda name: members[name].read())


def _apart(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    layers: dict[str, QuantizedLayer],
    before: str,
    dtype: torch.dtype,
) -> Iterator[Piece]:
    """The tensors of a dense checkpoint, experts one by one."""
    turned = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    for name, info in checkpoint.tensors.items():
        stem, _, suffix = name.rpartition(".")
        if stem not in layers or suffix not in SUFFIXES:
            yield _as_is(name, info)
        elif suffix == "qweight":
            layer = layers[stem]
            columns = layer.parts["scales"].shape[1]
            size = layer.in_features() * columns * dtype.itemsize

            def dequantized(layer: QuantizedLayer = layer, stem: str = stem) -> torch.Tensor:
                W = layer.read(before).dequantize(dtype)
                return W.T.contiguous() if any(path.endswith(stem) for path in turned) else W

            yield Piece(f"{stem}.weight", size, dequantized)


def _zeros_as(
    checkpoint: Checkpoint, layers: dict[str, QuantizedLayer], before: str, to: str
) -> Iterator[Piece]:
    """Zero points as version `to` stores them; everything else byte for byte."""
    for name, info in checkpoint.tensors.items():
        stem, _, suffix = name.rpartition(".")
        if stem not in layers or suffix != "qzeros" or before == to:
            yield _as_is(name, info)
            continue

        def rewritten(layer: QuantizedLayer = layers[stem]) -> torch.Tensor:
            q = layer.read(before)
            if to == "gptq" and bool((q.zeros == 0).any()):
                raise ConfigError(
                    f"{layer.name} has a zero point of 0, which v1 stores as -1 and readers take for "
                    f"{2**q.bits}: it stays in gptq_v2"
                )
            zeros = (q.zeros - 1) & (2**q.bits - 1) if to == "gptq" else q.zeros
            return pack(zeros, q.bits).T.contiguous()

        yield Piece(name, info.nbytes, rewritten)


def _write(out: Path, pieces: list[Piece]) -> None:
    """All pieces in shards of about SHARD bytes, and their index."""
    numbers, filled = [], 0
    for piece in pieces:
        filled += piece.nbytes
        numbers.append((filled - 1) // SHARD if filled else 0)
    count = len(set(numbers))
    weight_map: dict[str, str] = {}
    shards = groupby(zip(numbers, pieces, strict=True), key=lambda pair: pair[0])
    for index, (_, shard) in enumerate(shards):
        file = SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        tensors = {piece.name: piece.make() for _, piece in shard}
        write_safetensors(out / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    if count > 1:
        total = sum(piece.nbytes for piece in pieces)
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
