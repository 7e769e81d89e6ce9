"""`pack-quantized` of compressed-tensors, the format of llm-compressor and vLLM: tensors and config.

A weight [out, in] has the same numbers as in the GPTQ format, transposed:

    weight_packed      int32 [out, ⌈in·bits/32⌉]      codes along the input, one bit stream a row
    weight_scale       float [out, groups]
    weight_shape       int64 [2]                      out, in
    weight_zero_point  int32 [⌈out·bits/32⌉, groups]  zero points along the output; absent if symmetric
    weight_g_idx       int32 [in]                     only with act-order; read, but not written

Codes and zero points are unsigned, as in the GPTQ format: the signed ones of the specification, plus
2^(bits-1). Bits that no code fills are zero. This is how the library packs since 0.18; before, codes of
3, 5, 6 and 7 bits did not cross words. Act-order is not written: the library no longer reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from roundwise.checkpoint.config_values import (
    LayerConfig,
    check_pattern,
    flag,
    whole_number,
    word,
)
from roundwise.checkpoint.engines import ignore_patterns
from roundwise.core.quantized_weight import WIDTHS, QuantizedWeight, codes_per_block, pack, unpack
from roundwise.errors import CheckpointError, ConfigError
from roundwise.version import __version__

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PACKED, SCALE, SHAPE, ZERO, G_IDX = SUFFIXES = (
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
)  # fmt: skip


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
class Targets:
    """Settings of layers according to a config."""

    default: LayerConfig
    """Settings of linear layers that nothing else names."""
    names: dict[str, LayerConfig | None]
    """Name of a layer, or its last parts -> settings; None: it is not quantized."""
    rules: tuple[tuple[str, LayerConfig | None], ...]
    """(pattern, settings): the first that matches from the start of a name wins."""


def is_supported(raw: Mapping[str, Any]) -> bool:
    """Tells whether a quantization config is of packed integer weights, and quantizes nothing else."""
    try:
        parse_targets(raw, "")
    except (CheckpointError, ConfigError):
        return False
    return True


def parse_targets(raw: Mapping[str, Any], folder: str) -> Targets:
    """Returns the settings of layers in a quantization config of compressed-tensors.

    A layer that `ignore` names is not quantized; of the groups, one that names a layer comes before one
    with a pattern, and that before one for all linear layers.

    Args:
        raw: the config as a JSON object.
        folder: name of the checkpoint, for error messages.

    Raises:
        CheckpointError: the config is damaged.
        ConfigError: the format is not pack-quantized, or more than weights is quantized.
    """
    groups = [*config_groups(raw, folder)]
    formats = {word(group, "format", FORMAT) for group in (raw, *groups)}
    if formats != {FORMAT}:
        raise ConfigError(
            f"{folder} is in compressed-tensors format {', '.join(sorted(formats))}: only "
            f"{FORMAT} is supported"
        )
    activations = any(group.get("input_activations") for group in groups)
    if activations or raw.get("kv_cache_scheme") or raw.get("transform_config"):
        raise ConfigError(f"{folder} quantizes more than weights, which is not supported")
    ignored = raw.get("ignore") or []
    if not isinstance(ignored, list):
        raise CheckpointError(f"ignore in the quantization config of {folder} is not a list")
    default = LayerConfig(None, None, None, None)
    names: dict[str, LayerConfig | None] = {str(target): None for target in ignored}
    for group in groups:
        weights, targets = group.get("weights"), group.get("targets")
        if isinstance(weights, dict) and isinstance(targets, list):
            settings = _layer_config(weights, folder)
            for target in map(str, targets):
                names.setdefault(target, settings)
    default = names.pop("Linear", None) or default
    patterns = [target for target in names if target.startswith("re:")]
    rules = tuple((target.removeprefix("re:"), names.pop(target)) for target in patterns)
    for pattern, _ in rules:
        check_pattern(pattern)
    return Targets(default, names, rules)


def config_groups(raw: Mapping[str, Any], folder: str) -> Iterator[dict[str, Any]]:
    """Yields the groups of layers of a quantization config.

    Raises:
        CheckpointError: they are not JSON objects.
    """
    groups = raw.get("config_groups") or {}
    for group in groups.values() if isinstance(groups, dict) else [None]:
        if not isinstance(group, dict):
            raise CheckpointError(f"config_groups of {folder} is not a JSON object of objects")
        yield group


def _layer_config(weights: Mapping[str, Any], folder: str) -> LayerConfig:
    """Returns the settings in the `weights` of a config group."""
    if word(weights, "type", "int") != "int":
        raise ConfigError(f"{folder} quantizes weights to other types than integers")
    size = whole_number(weights, "group_size")
    by_row = weights.get("strategy") == "channel" and size is None
    order = weights.get("actorder")
    return LayerConfig(
        bits=whole_number(weights, "num_bits"),
        group_size=-1 if by_row else size,
        sym=flag(weights, "symmetric"),
        desc_act=True if order in ("group", "dynamic", True) else None,
    )


def width_of(words: int, columns: int, stated: int | None) -> int | None:
    """Returns the width of codes from the number of words in a row; None: no width fits.

    Args:
        words: number of words.
        columns: number of codes.
        stated: width according to the config, for rows so short that several widths fit.
    """
    fitting = [bits for bits in WIDTHS if packed_words(columns, bits) == words]
    return stated if stated in fitting else next(iter(fitting), None)


def packed_words(count: int, bits: int) -> int:
    """Returns the number of 32-bit words that `count` codes fill."""
    return -(-count * bits // 32)


def packed_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    """Returns the bytes of all tensors of a weight [rows, columns]."""
    groups = 1 if scheme.group_size == -1 else -(-columns // scheme.group_size)
    zeros = 0 if scheme.sym else groups * packed_words(rows, scheme.bits)
    return 4 * (rows * packed_words(columns, scheme.bits) + zeros) + 2 * groups * rows + 16


def scheme_from_weight(name: str, q: QuantizedWeight) -> Scheme:
    """Returns the scheme that describes a quantized weight.

    Args:
        name: the layer's name, for error messages.
        q: the weight.

    Raises:
        ConfigError: the format cannot express the weight's groups or act-order.
    """
    groups, columns = q.scales.shape[1], q.codes.shape[1]
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
        PACKED: pack_rows(q.codes, q.bits),
        SCALE: q.scales.contiguous(),
        SHAPE: torch.tensor(q.codes.shape),
    }
    if not sym:
        tensors[ZERO] = pack_rows(q.zeros.T, q.bits).T.contiguous()
    return tensors


def decode(
    tensors: dict[str, torch.Tensor], *, bits: int, group_size: int, shape: tuple[int, int]
) -> QuantizedWeight:
    """Inverse of `encode`, for files of any tool; `QuantizedLayer` checks that the tensors fit together.

    Args:
        tensors: the layer's tensors by suffix.
        bits: width of a code.
        group_size: input channels of a group, unless there is a weight_g_idx.
        shape: (out_features, in_features).
    """
    rows, columns = shape
    g_idx = tensors.get(G_IDX)
    if g_idx is None:
        g_idx = torch.arange(columns) // group_size
    return QuantizedWeight(
        codes=unpack_rows(tensors[PACKED], bits, columns), scales=tensors[SCALE],
        zeros=decode_zeros(tensors.get(ZERO), bits, (rows, tensors[SCALE].shape[1])),
        g_idx=g_idx.to(torch.int32), bits=bits,
    )  # fmt: skip


def decode_zeros(words: torch.Tensor | None, bits: int, shape: tuple[int, int]) -> torch.Tensor:
    """Returns the zero points, int32 [out, groups].

    Args:
        words: the weight_zero_point; None: symmetric, the middle code stands for zero.
        bits: width of a code.
        shape: (out_features, groups).
    """
    if words is None:
        return torch.full(shape, 2 ** (bits - 1), dtype=torch.int32)
    return unpack_rows(words.T, bits, shape[0]).T.contiguous().to(torch.int32)


def quantization_config(
    schemes: dict[str, Scheme],
    unquantized: Iterable[str],
    *,
    ignored: Iterable[str] = (),
    head: str | None = None,
    meta: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the `quantization_config` of config.json.

    Args:
        schemes: scheme of each quantized layer, by name.
        unquantized: names of linear layers that are not quantized.
        ignored: names of modules that only the files have, such as draft layers.
        head: name of the output head, if it is quantized: vLLM does not count it as a linear layer.
        meta: how the checkpoint was made; readers keep or ignore it.
    """
    distinct = [scheme for scheme, _ in Counter(schemes.values()).most_common()]
    modules = ignore_patterns(ignored, schemes)
    inside = tuple(f"{module}." for module in modules)
    dense = {name for name in unquantized if name not in modules and not name.startswith(inside)}
    everything = ["Linear", head] if head in schemes else ["Linear"]
    groups = {
        f"group_{index}": {
            "targets": everything
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
        "ignore": sorted(dense | {f"re:{pattern}" for pattern in modules.values()}),
        "kv_cache_scheme": None,
        "meta": meta or {"quantizer": [f"roundwise:{__version__}"]},
    }


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes [n, m] along the second axis to int32 [n, ⌈m·bits/32⌉], padding with zeros."""
    count = codes.shape[1]
    padding = -count % codes_per_block(bits)
    padded = torch.nn.functional.pad(codes, (0, padding)) if padding else codes
    return pack(padded.T, bits)[: packed_words(count, bits)].T.contiguous()


def unpack_rows(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Inverse of `pack_rows`: returns uint8 [n, columns]."""
    padding = packed_words(columns + -columns % codes_per_block(bits), bits) - words.shape[1]
    padded = torch.nn.functional.pad(words, (0, padding)) if padding else words
    return unpack(padded.T.contiguous(), bits).T[:, :columns].contiguous()
