"""Reads and writes `pack-quantized` of compressed-tensors, the format of llm-compressor and vLLM.

A weight [out, in] has the same numbers as in the GPTQ format, transposed:

    weight_packed      int32 [out, in·bits/32]      codes along the input, one bit stream a row
    weight_scale       float [out, groups]
    weight_shape       int64 [2]                    out, in
    weight_zero_point  int32 [out·bits/32, groups]  zero points along the output; absent if symmetric
    weight_g_idx       int32 [in]                   only with act-order; read, but not written

Codes and zero points are unsigned, as in the GPTQ format: the signed ones of the specification, plus
2^(bits-1). Two things are not written because releases of the library disagree about them: 3 bits, and
act-order, which the newest release cannot read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from roundwise.checkpoint.config_values import flag, matches, whole_number
from roundwise.checkpoint.quantization_config import LayerConfig
from roundwise.checkpoint.reader import Checkpoint, TensorInfo
from roundwise.core.quantized_weight import QuantizedWeight, pack, unpack
from roundwise.errors import CheckpointError, ConfigError

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PACKED, SCALE, SHAPE, ZERO, G_IDX = (
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
)  # fmt: skip
SUFFIXES = (PACKED, SCALE, SHAPE, ZERO, G_IDX)
WIDTHS = (2, 4, 8)
#: Types of the tensors, as safetensors codes.
TYPES = {
    PACKED: ("I32",), SCALE: ("F16", "BF16", "F32"), SHAPE: ("I64", "I32"), ZERO: ("I32",),
    G_IDX: ("I32", "I64"),
}  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """Quantization settings of a layer."""

    bits: int
    group_size: int
    """Input channels per scale; -1: one scale for the whole row."""
    sym: bool

    def weights_config(self) -> dict[str, Any]:
        """Returns the `weights` entry of a config group, as the library's QuantizationArgs has it."""
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
    """A quantized linear layer of a checkpoint."""

    name: str
    tensors: dict[str, TensorInfo]
    """The layer's tensors by suffix, such as weight_packed."""
    config: LayerConfig
    """Settings of the layer according to the config."""

    def _check_types(self) -> None:
        for suffix, info in self.tensors.items():
            if info.dtype not in TYPES[suffix]:
                raise CheckpointError(
                    f"{self.name}.{suffix} is {info.dtype}, but must be {' or '.join(TYPES[suffix])}"
                )

    def _check_config(self, rows: int, columns: int, bits: int) -> None:
        """Refuses a config that contradicts the tensors."""
        groups, stated = self.tensors[SCALE].shape[1], self.config
        size = columns if stated.group_size in (None, -1) else stated.group_size or columns
        if stated.bits not in (None, bits):
            raise CheckpointError(
                f"{self.name} has codes of {bits} bits, but the config says num_bits={stated.bits}"
            )
        if stated.group_size is not None and -(-columns // size) != groups:
            raise CheckpointError(
                f"{self.name} has {groups} groups of its {columns} input channels, but the config says "
                f"group_size={stated.group_size}"
            )
        if stated.sym is False and ZERO not in self.tensors:
            raise CheckpointError(f"{self.name} has no {ZERO}, but the config says symmetric=false")

    def shape(self) -> tuple[int, int]:
        """Returns (out_features, in_features).

        Raises:
            CheckpointError: the shapes of the layer's tensors contradict each other.
        """
        self._check_types()
        if self.tensors[SHAPE].shape != (2,):
            raise CheckpointError(f"{self.name}.{SHAPE} does not hold two numbers")
        rows, columns = (int(size) for size in self.tensors[SHAPE].read())
        packed, scale = self.tensors[PACKED].shape, self.tensors[SCALE].shape
        words = [-(-columns * bits // 32) for bits in WIDTHS]
        if len(packed) != 2 or len(scale) != 2 or packed[0] != rows or scale[0] != rows:
            raise CheckpointError(
                f"{self.name}: weight_packed {list(packed)}, weight_scale {list(scale)} and "
                f"weight_shape {[rows, columns]} do not fit together"
            )
        if columns < 1 or packed[1] not in words or not 1 <= scale[1] <= columns:
            raise CheckpointError(
                f"{self.name}: weight_packed {list(packed)} does not fit {columns} codes of 2, 4 or 8 "
                "bits"
            )
        return rows, columns

    def bits(self) -> int:
        """Returns the width of the codes.

        Raises:
            CheckpointError: the shapes of the layer's tensors contradict each other.
        """
        _, columns = self.shape()
        words = self.tensors[PACKED].shape[1]
        return next(bits for bits in WIDTHS if -(-columns * bits // 32) == words)

    def read(self) -> QuantizedWeight:
        """Returns the layer's codes, scales and zero points.

        Raises:
            CheckpointError: the layer's tensors contradict each other.
            ConfigError: float16 cannot represent the scales exactly.
        """
        (rows, columns), bits = self.shape(), self.bits()
        self._check_config(rows, columns, bits)
        scales = self.tensors[SCALE].read()
        groups = scales.shape[1]
        if not bool(torch.isfinite(scales).all()) or not bool((scales != 0).all()):
            raise CheckpointError(f"{self.name} has a scale that is zero or not finite")
        halves = scales.to(torch.float16)
        if not torch.equal(halves.to(torch.float32), scales.to(torch.float32)):
            raise ConfigError(
                f"{self.name} has scales that float16, the type of the GPTQ format, cannot hold exactly"
            )
        codes = _unpack_rows(self.tensors[PACKED].read(), bits, columns)
        # Symmetric layers store no zero points: the middle code stands for zero.
        zeros = torch.full((rows, groups), 2 ** (bits - 1), dtype=torch.int32)
        if ZERO in self.tensors:
            words = self.tensors[ZERO].read()
            if words.shape != (-(-rows * bits // 32), groups):
                raise CheckpointError(
                    f"{self.name}: weight_zero_point {list(words.shape)} does not fit {rows} rows and "
                    f"{groups} groups"
                )
            zeros = _unpack_rows(words.T.contiguous(), bits, rows).T.contiguous().to(torch.int32)
            if self.config.sym and not bool((zeros == 2 ** (bits - 1)).all()):
                raise CheckpointError(
                    f"{self.name} has zero points beside the middle, but the config says symmetric=true"
                )
        if G_IDX in self.tensors:
            g_idx = self.tensors[G_IDX].read().to(torch.int32)
        else:
            size = columns if groups == 1 else self.config.group_size or -(-columns // groups)
            g_idx = torch.arange(columns, dtype=torch.int32) // size
        if g_idx.shape != (columns,) or int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            raise CheckpointError(
                f"{self.name}.{G_IDX} does not assign {columns} channels to {groups} groups"
            )
        return QuantizedWeight(codes=codes, scales=halves, zeros=zeros, g_idx=g_idx, bits=bits)


def packed_layers(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, PackedLayer]:
    """Returns all quantized linear layers of a compressed-tensors checkpoint, by name.

    Args:
        checkpoint: the checkpoint.
        settings: its quantization config.

    Raises:
        CheckpointError: a tensor of a layer is missing, or there are no quantized layers.
        ConfigError: the format is not pack-quantized, or activations are quantized too.
    """
    groups = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    if not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(
            f"config_groups of {checkpoint.folder} is not a JSON object of objects"
        )
    formats = {str(group.get("format") or FORMAT) for group in (settings, *groups)}
    if formats != {FORMAT}:
        raise ConfigError(
            f"{checkpoint.folder} is in compressed-tensors format {', '.join(sorted(formats))}: only "
            f"{FORMAT} is supported"
        )
    activations = any(group.get("input_activations") for group in groups)
    if activations or settings.get("kv_cache_scheme") or settings.get("transform_config"):
        raise ConfigError(
            f"{checkpoint.folder} quantizes more than weights, which the GPTQ format cannot express"
        )
    layers = {}
    for tensor in checkpoint.tensors:
        name, _, suffix = tensor.rpartition(".")
        if suffix == PACKED:
            tensors = {
                suffix: checkpoint.tensors[f"{name}.{suffix}"]
                for suffix in SUFFIXES
                if f"{name}.{suffix}" in checkpoint.tensors
            }
            missing = {SCALE, SHAPE} - set(tensors)
            if missing:
                raise CheckpointError(f"{name} lacks {', '.join(sorted(missing))}")
            layers[name] = PackedLayer(name, tensors, _layer_config(name, groups))
    if not layers:
        raise CheckpointError(f"{checkpoint.folder} has no quantized layers")
    return layers


def _layer_config(name: str, groups: list[dict[str, Any]]) -> LayerConfig:
    """Returns the settings of a layer: those of the first group that names it, else that is for all."""
    for is_target in (_is_name, _is_class):
        for group in groups:
            targets, weights = group.get("targets"), group.get("weights")
            if not isinstance(targets, list) or not isinstance(weights, dict):
                continue
            if any(is_target(str(target), name) for target in targets):
                size = whole_number(weights, "group_size")
                by_row = weights.get("strategy") == "channel" and size is None
                return LayerConfig(
                    bits=whole_number(weights, "num_bits"),
                    group_size=-1 if by_row else size,
                    sym=flag(weights, "symmetric"),
                    desc_act=None,
                )
    return LayerConfig(None, None, None, None)


def _is_name(target: str, name: str) -> bool:
    """Tells whether a target of a config group is the name of a layer or a pattern that matches it."""
    if target.startswith("re:"):
        return matches(target.removeprefix("re:"), name)
    return name == target or name.endswith(f".{target}")


def _is_class(target: str, _: str) -> bool:
    """Tells whether a target of a config group is all linear layers."""
    return target == "Linear"


def scheme_from_weight(name: str, q: QuantizedWeight) -> Scheme:
    """Returns the scheme that describes a quantized weight.

    Args:
        name: the layer's name, for error messages.
        q: the weight.

    Raises:
        ConfigError: the format cannot express the weight's width, groups or act-order.
    """
    groups, columns = q.scales.shape[1], q.codes.shape[1]
    if q.bits not in WIDTHS:
        raise ConfigError(
            f"{name}: {q.bits} bits are packed in different ways by releases of compressed-tensors"
        )
    if columns % groups:
        raise ConfigError(
            f"{name}: {columns} input channels are not a multiple of {groups} groups, which "
            "compressed-tensors requires"
        )
    size = columns // groups
    if not torch.equal(q.g_idx, torch.arange(columns, dtype=torch.int32) // size):
        raise ConfigError(
            f"{name} was quantized with desc_act=True, and newer releases of compressed-tensors do not "
            "read act-order groups: use desc_act=False"
        )
    sym = bool((q.zeros == 2 ** (q.bits - 1)).all())
    return Scheme(q.bits, -1 if groups == 1 else size, sym)


def suffixes(*, sym: bool) -> tuple[str, ...]:
    """Returns the suffixes of the tensors that `encode` makes."""
    return (PACKED, SCALE, SHAPE) if sym else (PACKED, SCALE, SHAPE, ZERO)


def encode(q: QuantizedWeight, *, sym: bool) -> dict[str, torch.Tensor]:
    """Returns the tensors of a quantized weight by suffix, in the layout of the module's docstring.

    Args:
        q: the weight.
        sym: leave zero points out; all must be 2^(bits-1).
    """
    tensors = {
        PACKED: _pack_rows(q.codes, q.bits),
        SCALE: q.scales,
        SHAPE: torch.tensor(q.codes.shape),
    }
    if not sym:
        tensors[ZERO] = _pack_rows(q.zeros.T, q.bits).T.contiguous()
    return tensors


def quantization_config(schemes: dict[str, Scheme], unquantized: Iterable[str]) -> dict[str, Any]:
    """Returns the `quantization_config` of config.json.

    Args:
        schemes: scheme of each quantized layer, by name.
        unquantized: names of linear layers that are not quantized.
    """
    distinct = [scheme for scheme, _ in Counter(schemes.values()).most_common()]
    groups = {
        f"group_{index}": {
            "targets": ["Linear"]
            if len(distinct) == 1
            else [name for name, other in schemes.items() if other == scheme],
            "weights": scheme.weights_config(),
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
        for index, scheme in enumerate(distinct)
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(unquantized),
        "kv_cache_scheme": None,
    }


def _pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes [n, m] along the second axis to int32 [n, ceil(m·bits/32)], padding with zeros."""
    padding = -codes.shape[1] % (32 // bits)
    padded = torch.nn.functional.pad(codes, (0, padding)) if padding else codes
    return pack(padded.T.contiguous(), bits).T.contiguous()


def _unpack_rows(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Inverse of `_pack_rows`: returns uint8 [n, columns]."""
    return unpack(words.T.contiguous(), bits).T[:, :columns].contiguous()
