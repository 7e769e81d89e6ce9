"""Finds the FP8, FP4 and INT8 weights of a checkpoint with their scales, under the names of each tool.

    weight, weight_scale_inv           FP8 of DeepSeek and transformers, MXFP8
    weight, scale                      DeepSeek-V4: FP8; FP4 in bytes of type I8
    weight, qscale_weight              FP8 of Mistral
    weight, weight_scale               FP8 and INT8 of compressed-tensors, fbgemm and ModelOpt
    weight, weight_scale, weight_scale_2                        NVFP4 of ModelOpt
    weight_packed, weight_scale, [weight_global_scale]          MXFP4, NVFP4 of compressed-tensors
    gate_up_proj_blocks, gate_up_proj_scales                    MXFP4 of GPT-OSS: [experts, out, …]

Scales of activations and of the key-value cache are left out: a dense model has no use for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from roundwise.checkpoint.dequantize.scaled import Kind, ScaledWeight, scaled_weight
from roundwise.checkpoint.reader import TensorInfo
from roundwise.errors import CheckpointError

#: Last parts of names of scales and zero points of activations and of the key-value cache.
ACTIVATION_SCALES = (
    "input_scale", "input_zero_point", "input_global_scale", "activation_scale", "qscale_act",
    "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale", "k_zero_point",
    "v_zero_point", "kv_scale",
)  # fmt: skip
#: Ends of names of scales.
SCALE_ENDINGS = ("_scale", "_scale_inv", ".scale", ".qscale_weight", "_scales")


@dataclass(frozen=True)
class ScaledWeights:
    """The scaled weights of a checkpoint, and all tensors that go into them."""

    weights: dict[str, ScaledWeight]
    """By the name of the dense weight."""
    used: frozenset[str]
    """Names of tensors that the dense checkpoint does not have."""


def find_scaled(
    tensors: Mapping[str, TensorInfo],
    dtype: torch.dtype,
    *,
    bytes_are: Kind,
    blocks: Iterable[tuple[int, int]] = (),
) -> ScaledWeights:
    """Returns all weights that are stored as FP8, FP4 or INT8.

    Args:
        tensors: all tensors of the files by name.
        dtype: type of the dense weights.
        bytes_are: numbers that a weight of type I8 holds.
        blocks: sizes of blocks according to the config.

    Raises:
        CheckpointError: scales are missing, or do not fit their weight or the config.
    """
    weights: dict[str, ScaledWeight] = {}
    used = {name for name in tensors if name.rpartition(".")[2] in ACTIVATION_SCALES}
    for name, info in tensors.items():
        kind = _kind(name, info, tensors, bytes_are)
        if kind is None or name in used:
            continue
        dense, parts = _dense_name(name), _Parts(name, tensors)
        weights[dense] = _read_parts(dense, kind, info, parts, dtype, [*blocks])
        used |= {name, *parts.used}
    return ScaledWeights(weights, frozenset(used))


def has_scales(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tells whether some tensors are FP8, FP4 or INT8 numbers that need scales."""
    return any(
        _kind(name, info, tensors, "INT8") is not None
        and _Parts(name, tensors).find(*_scale_names(name)) is not None
        for name, info in tensors.items()
    )


def _kind(
    name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], bytes_are: Kind
) -> Kind | None:
    """Returns the numbers that a tensor holds; None: it is not a scaled weight."""
    if info.dtype in ("F8_E4M3", "F8_E5M2"):
        return None if name.endswith(SCALE_ENDINGS) else "FP8"
    if info.dtype == "I8":
        return bytes_are if name.endswith(".weight") else None
    if info.dtype == "U8":
        pairs = (
            name.endswith(".weight_packed")
            or (name.endswith("_blocks") and f"{_dense_name(name)}_scales" in tensors)
            or (name.endswith(".weight") and f"{name}_scale" in tensors)
        )
        return "FP4" if pairs else None
    return None


def _dense_name(name: str) -> str:
    """Returns the name of the dense weight."""
    if name.endswith("_blocks"):
        return name.removesuffix("_blocks")
    return name.removesuffix("_packed")


def _scale_names(name: str) -> list[str]:
    """Returns the names that the scales of a weight may have."""
    dense = _dense_name(name)
    module = dense.removesuffix(".weight")
    names = [f"{dense}_scale_inv", f"{dense}_scale", f"{dense}_scales"]
    return names if module == dense else [*names, f"{module}.scale", f"{module}.qscale_weight"]


class _Parts:
    """Looks up the tensors that belong to a weight, and remembers which there are."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo]) -> None:
        self.name, self.tensors = name, tensors
        self.used: list[str] = []

    def find(self, *names: str) -> TensorInfo | None:
        """Returns the first tensor that there is."""
        found = next((name for name in names if name in self.tensors), None)
        if found is None:
            return None
        self.used.append(found)
        return self.tensors[found]


def _read_parts(
    dense: str, kind: Kind, codes: TensorInfo, parts: _Parts, dtype: torch.dtype,
    blocks: list[tuple[int, int]],
) -> ScaledWeight:  # fmt: skip
    names = _scale_names(parts.name)
    scales = parts.find(*names)
    if scales is None:
        raise CheckpointError(f"{parts.name} is in {kind}, but {names[0]} is missing")
    parts.find(f"{dense}_shape")
    divisor, factor = parts.find(f"{dense}_global_scale"), parts.find(f"{dense}_scale_2")
    stacked = parts.name.endswith("_blocks")
    if stacked:  # [experts, out, blocks, bytes of a block]
        codes = replace(codes, shape=(*codes.shape[:-2], math.prod(codes.shape[-2:])))
    return scaled_weight(
        dense, kind, codes, scales, dtype,
        blocks=[] if kind == "FP4" else blocks,
        zeros=parts.find(f"{dense}_zero_point"),
        factor=factor if divisor is None else divisor, divides=divisor is not None,
        transposed=stacked,
    )  # fmt: skip
