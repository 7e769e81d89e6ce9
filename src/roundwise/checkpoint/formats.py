"""The formats of quantized layers, GPTQ and compressed-tensors: their tensors, sizes and configs.

Everything that writes layers asks here, so that a format is added in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from roundwise.checkpoint import compressed_tensors, gptq_format
from roundwise.checkpoint.compressed_tensors import G_IDX, PACKED, SCALE, SHAPE, ZERO, Scheme
from roundwise.config import QuantizeConfig
from roundwise.core.quantized_weight import QuantizedWeight

#: Turns a quantized weight with the settings of its layer into tensors, by suffix.
Encoder = Callable[[QuantizedWeight, QuantizeConfig], dict[str, torch.Tensor]]
FLOATS = ("F16", "BF16", "F32")
COMPRESSED_TENSORS = "compressed-tensors"
#: Suffixes of the tensors of a layer, in any format.
SUFFIXES = (*gptq_format.SUFFIXES, *compressed_tensors.SUFFIXES)


@dataclass(frozen=True)
class Layout:
    """The tensors of a layer in a format, by their suffixes."""

    codes: str
    scales: str
    zeros: str
    g_idx: str
    required: tuple[str, ...]
    types: dict[str, tuple[str, ...]]
    """Suffix -> types, as safetensors codes."""


GPTQ = Layout(
    "qweight", "scales", "qzeros", "g_idx", ("qweight", "qzeros", "scales"),
    {
        "qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS, "g_idx": ("I32", "I64"),
        "bias": FLOATS,
    },
)  # fmt: skip
PACK_QUANTIZED = Layout(
    PACKED, SCALE, ZERO, G_IDX, (PACKED, SCALE, SHAPE),
    {
        PACKED: ("I32",), SCALE: FLOATS, SHAPE: ("I64", "I32"), ZERO: ("I32",),
        G_IDX: ("I32", "I64"), "bias": FLOATS,
    },
)  # fmt: skip


def layout_of(file_format: str) -> Layout:
    """Returns the tensors of a format: gptq, gptq_v2 or compressed-tensors."""
    return PACK_QUANTIZED if file_format == COMPRESSED_TENSORS else GPTQ


def scheme_of(config: QuantizeConfig) -> Scheme:
    """Returns the scheme of compressed-tensors that the settings of a layer ask for."""
    return Scheme(config.bits, config.group_size, config.sym)


def encoder(file_format: str) -> Encoder:
    """Returns the function that turns a quantized weight into the tensors of a format, by suffix.

    Args:
        file_format: gptq, gptq_v2 or compressed-tensors.
    """
    if file_format == COMPRESSED_TENSORS:
        return lambda q, config: compressed_tensors.encode(q, sym=config.sym)
    return gptq_format.encode


def packed_bytes(rows: int, columns: int, config: QuantizeConfig) -> int:
    """Returns the bytes of all tensors of a quantized weight.

    Args:
        rows: output channels.
        columns: input channels.
        config: settings of the layer.
    """
    if config.format == COMPRESSED_TENSORS:
        return compressed_tensors.packed_bytes(rows, columns, scheme_of(config))
    return gptq_format.packed_bytes(rows, columns, config)


def fills_words(out_features: int, in_features: int, config: QuantizeConfig) -> bool:
    """Returns True if the format can store codes of a weight of this shape."""
    # compressed-tensors leaves the bits of the last word of a row empty.
    return config.format == COMPRESSED_TENSORS or gptq_format.fills_words(
        out_features, in_features, config.bits
    )


def shape_problem(out_features: int, in_features: int, config: QuantizeConfig) -> str | None:
    """Returns why the format cannot store a weight with these settings; None: it can."""
    if not gptq_format.group_size_divides(in_features, config.group_size):
        return f"group_size={config.group_size} does not divide {in_features} input channels"
    if not fills_words(out_features, in_features, config):
        return gptq_format.words_problem(out_features, in_features, config.bits)
    return None


def quantization_config(
    config: QuantizeConfig,
    *,
    true_sequential: bool,
    linears: Mapping[str, str],
    skipped: Iterable[str],
    outside: Iterable[str],
    ignored: Iterable[str],
    head: str | None,
) -> dict[str, Any]:
    """Returns the `quantization_config` of config.json that engines read.

    Args:
        config: settings of the run.
        true_sequential: the run was in true_sequential mode.
        linears: linear layers that are quantized unless the settings say otherwise: name in the model
            -> name in the files.
        skipped: names of linear layers beside them that are never quantized, whatever the settings say.
        outside: names of all other layers with a matrix, in the model and in the files.
        ignored: names of modules that only the files have, such as draft layers.
        head: name of the output head.
    """
    skipped = [*skipped]
    if config.format != COMPRESSED_TENSORS:
        return gptq_format.quantization_config(
            config, true_sequential=true_sequential, skipped=skipped, linears=linears,
            ignored=ignored,
        )  # fmt: skip
    schemes, unquantized = dict[str, Scheme](), {*skipped, *outside}
    for name, stored in linears.items():
        settings = config.for_module(name)
        if settings is None:
            unquantized |= {name, stored}
        else:
            schemes |= dict.fromkeys((name, stored), scheme_of(settings))
    meta = gptq_format.run_meta(config)
    return compressed_tensors.quantization_config(
        schemes, unquantized, ignored=ignored, head=head, meta=meta
    )
