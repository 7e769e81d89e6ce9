"""The compressed-tensors format, `pack-quantized`: what llm-compressor writes and vLLM reads.

For a weight [out, in], the same numbers as in the GPTQ format, turned around:

    weight_packed      int32 [out, in·bits/32]      codes along the input, one bit stream a row
    weight_scale       float [out, groups]
    weight_shape       int64 [2]                    out, in
    weight_zero_point  int32 [out·bits/32, groups]  zero points along the output; not if symmetric
    weight_g_idx       int32 [in]                   only with act-order; read, but not written

Codes and zero points are unsigned, as in the GPTQ format: the signed ones of the specification, plus
2^(bits-1). What releases of the library disagree about is not written: 3 bits, and act-order, which
the newest cannot read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from roundwise.checkpoint.reader import Checkpoint, TensorInfo
from roundwise.core.quantized_weight import QuantizedWeight, pack, unpack
from roundwise.errors import CheckpointError, ConfigError

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PACKED, SCALE, SHAPE, ZERO, G_IDX = (
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
)  # fmt: skip
SUFFIXES = (PACKED, SCALE, SHAPE, ZERO, G_IDX)
WIDTHS = (2, 4, 8)


@dataclass(frozen=True)
class Scheme:
    """How some layers are quantized."""

    bits: int
    group_size: int
    """-1: a scale for each row."""
    sym: bool

    def settings(self) -> dict[str, Any]:
        """`weights` of a config group."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.sym,
            "strategy": "channel" if self.group_size == -1 else "group",
            "group_size": None if self.group_size == -1 else self.group_size,
            "dynamic": False,
            "actorder": None,
        }


@dataclass(frozen=True)
class PackedLayer:
    """A quantized linear as it stands in a checkpoint."""

    name: str
    parts: dict[str, TensorInfo]

    def shape(self) -> tuple[int, int]:
        """Output and input channels.

        Raises:
            CheckpointError: tensors that do not fit together.
        """
        rows, columns = (int(size) for size in self.parts[SHAPE].read())
        packed, scale = self.parts[PACKED].shape, self.parts[SCALE].shape
        words = [-(-columns * bits // 32) for bits in WIDTHS]
        if len(packed) != 2 or len(scale) != 2 or packed[0] != rows or scale[0] != rows:
            raise CheckpointError(
                f"{self.name}: weight_packed {list(packed)}, weight_scale {list(scale)} and "
                f"weight_shape {[rows, columns]} do not fit together"
            )
        if columns < 1 or packed[1] not in words or not 1 <= scale[1] <= columns:
            raise CheckpointError(
                f"{self.name}: weight_packed {list(packed)} holds no {columns} codes of 2, 4 or 8 bits"
            )
        return rows, columns

    def bits(self) -> int:
        """Width of its codes."""
        _, columns = self.shape()
        width = self.parts[PACKED].shape[1]
        return next(bits for bits in WIDTHS if -(-columns * bits // 32) == width)

    def scheme(self) -> Scheme:
        """How it is quantized, from its own tensors."""
        _, columns = self.shape()
        groups = self.parts[SCALE].shape[1]
        return Scheme(
            self.bits(), -1 if groups == 1 else -(-columns // groups), ZERO not in self.parts
        )

    def read(self) -> QuantizedWeight:
        """Its codes, scales and zero points.

        Raises:
            CheckpointError: tensors that do not fit together.
            ConfigError: scales that float16 does not hold exactly.
        """
        (rows, columns), bits = self.shape(), self.bits()
        scales = self.parts[SCALE].read()
        groups = scales.shape[1]
        halves = scales.to(torch.float16)
        if not torch.equal(halves.to(torch.float32), scales.to(torch.float32)):
            raise ConfigError(
                f"{self.name}: its scales do not fit float16, as the GPTQ format has them"
            )
        codes = _unpacked(self.parts[PACKED].read(), bits, columns)
        # Symmetric: the middle code stands for zero.
        zeros = torch.full((rows, groups), 2 ** (bits - 1), dtype=torch.int32)
        if ZERO in self.parts:
            words = self.parts[ZERO].read()
            if words.shape != (-(-rows * bits // 32), groups):
                raise CheckpointError(f"{self.name}: weight_zero_point is {list(words.shape)}")
            zeros = _unpacked(words.T.contiguous(), bits, rows).T.contiguous().to(torch.int32)
        if G_IDX in self.parts:
            g_idx = self.parts[G_IDX].read().to(torch.int32)
        else:
            g_idx = torch.arange(columns, dtype=torch.int32) // -(-columns // groups)
        if g_idx.shape != (columns,) or int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            raise CheckpointError(
                f"{self.name}.{G_IDX} does not assign {columns} channels to {groups} groups"
            )
        return QuantizedWeight(codes=codes, scales=halves, zeros=zeros, g_idx=g_idx, bits=bits)


def packed_layers(checkpoint: Checkpoint) -> dict[str, PackedLayer]:
    """All quantized linears of a compressed-tensors checkpoint, by name.

    Raises:
        CheckpointError: one of a layer's tensors is missing, or there are no layers.
        ConfigError: a format other than pack-quantized, or activations are quantized too.
    """
    settings = checkpoint.config["quantization_config"]
    groups = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    formats = {settings.get("format"), *(group.get("format") for group in groups)} - {None}
    if formats != {FORMAT}:
        raise ConfigError(
            f"compressed-tensors {', '.join(map(str, formats))}: only {FORMAT} is read"
        )
    activations = any(group.get("input_activations") for group in groups)
    if activations or settings.get("kv_cache_scheme") or settings.get("transform_config"):
        raise ConfigError(
            f"{checkpoint.folder} quantizes more than weights, which the GPTQ format cannot say"
        )
    found = {}
    for tensor in checkpoint.tensors:
        name, _, suffix = tensor.rpartition(".")
        if suffix == PACKED:
            parts = {
                part: checkpoint.tensors[f"{name}.{part}"]
                for part in SUFFIXES
                if f"{name}.{part}" in checkpoint.tensors
            }
            missing = {SCALE, SHAPE} - set(parts)
            if missing:
                raise CheckpointError(f"{name} lacks {', '.join(sorted(missing))}")
            found[name] = PackedLayer(name, parts)
    if not found:
        raise CheckpointError(f"{checkpoint.folder} has no quantized layers")
    return found


def scheme_of(name: str, q: QuantizedWeight) -> Scheme:
    """How a weight is described.

    Raises:
        ConfigError: the format has no way to say it.
    """
    groups, columns = q.scales.shape[1], q.codes.shape[1]
    if q.bits not in WIDTHS:
        raise ConfigError(
            f"{name}: {q.bits} bits are packed in different ways by releases of compressed-tensors"
        )
    if columns % groups:
        raise ConfigError(
            f"{name}: {columns} input channels are no multiple of {groups} groups, which "
            "compressed-tensors asks for"
        )
    size = columns // groups
    if not torch.equal(q.g_idx, torch.arange(columns, dtype=torch.int32) // size):
        raise ConfigError(
            f"{name} was quantized with desc_act=True, and newer releases of compressed-tensors do not "
            "read the order of its groups: use desc_act=False"
        )
    sym = bool((q.zeros == 2 ** (q.bits - 1)).all())
    return Scheme(q.bits, -1 if groups == 1 else size, sym)


def parts_of(sym: bool) -> tuple[str, ...]:
    """Suffixes of the tensors of a layer."""
    return (PACKED, SCALE, SHAPE) if sym else (PACKED, SCALE, SHAPE, ZERO)


def encode(q: QuantizedWeight, *, sym: bool) -> dict[str, torch.Tensor]:
    """The tensors of a quantized weight, by suffix."""
    tensors = {
        PACKED: _packed(q.codes, q.bits),
        SCALE: q.scales,
        SHAPE: torch.tensor(q.codes.shape),
    }
    if not sym:
        tensors[ZERO] = _packed(q.zeros.T, q.bits).T.contiguous()
    return tensors


def quantization_config(schemes: dict[str, Scheme], left: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        schemes: of each quantized layer.
        left: names of linear layers that are not quantized.
    """
    kinds = [scheme for scheme, _ in Counter(schemes.values()).most_common()]
    groups = {
        f"group_{index}": {
            "targets": ["Linear"]
            if len(kinds) == 1
            else [name for name, scheme in schemes.items() if scheme == kind],
            "weights": kind.settings(),
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
        for index, kind in enumerate(kinds)
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(left),
        "kv_cache_scheme": None,
    }


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [n, m] packed along the second axis, the last word filled with zeros."""
    per_word = 32 // bits
    rest = -codes.shape[1] % per_word
    whole = torch.nn.functional.pad(codes, (0, rest)) if rest else codes
    return pack(whole.T.contiguous(), bits).T.contiguous()


def _unpacked(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `_packed`: uint8 [n, columns]."""
    return unpack(words.T.contiguous(), bits).T[:, :columns].contiguous()
