"""Chooses a group size that all layers of a model can take, and names layers that cannot be stored.

Needs names and shapes only, so that a run is refused before any weight is read.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from transformers.pytorch_utils import Conv1D

from roundwise.checkpoint.formats import COMPRESSED_TENSORS, fills_words
from roundwise.checkpoint.gptq_format import group_size_divides
from roundwise.checkpoint.transformed_view import stored_as
from roundwise.config import QuantizeConfig
from roundwise.core.quantized_weight import codes_per_block
from roundwise.model.blocks import Block, weight_of
from roundwise.model.moe import parse_expert_name
from roundwise.model.streamed import StreamedModel

#: Group sizes that are chosen from, best first: fewest bits for scales, and all engines take them.
GROUP_SIZES = (128, 64, 32)
#: Group sizes that messages name.
KNOWN_SIZES = (512, 256, 128, 64, 32, 16)
#: Degrees of tensor parallelism that `tensor_parallel_degrees` tries.
TENSOR_PARALLEL_DEGREES = (1, 2, 4, 8, 16, 32)


class LayerShape(NamedTuple):
    """Name and size of a linear layer."""

    name: str
    out_features: int
    in_features: int
    is_conv1d: bool = False


def layer_shapes(blocks: Iterable[Block]) -> list[LayerShape]:
    """Returns the shapes of all linear layers of some blocks."""
    return [
        LayerShape(name, rows, columns, isinstance(linear, Conv1D))
        for block in blocks
        for name, linear in block.linears.items()
        for rows, columns in [weight_of(linear).shape]
    ]


def fit_group_size(
    shapes: list[LayerShape], config: QuantizeConfig
) -> tuple[QuantizeConfig, str | None]:
    """Returns settings with a group size for the model if none was given, and a note about it.

    The whole model gets one size, which every reader of the format takes; sizes by layer need rules that
    several readers do not know.

    Args:
        shapes: all linear layers.
        config: settings; returned unchanged if a group size was given.
    """
    if not config.chooses_group_size:
        return config, None
    widths = [shape.in_features for shape in shapes if _has_common_size(shape.name, config)]

    def taking(size: int) -> int:
        return sum(group_size_divides(width, size) for width in widths)

    size = max(GROUP_SIZES, key=taking)  # of equals the first, which is the largest
    fitted = config.model_copy(update={"group_size": size})
    if size == GROUP_SIZES[0]:
        return fitted, None
    odd = [width for width in widths if not group_size_divides(width, GROUP_SIZES[0])]
    most = max(set(odd), key=odd.count)
    return fitted, (
        f"groups of {size}: {len(odd)} of {len(widths)} layers have input channels ({most}) that "
        f"groups of {GROUP_SIZES[0]} do not divide"
    )


def _has_common_size(name: str, config: QuantizeConfig) -> bool:
    """Returns True if a layer is quantized with the group size of the model, not one of its own."""
    for pattern, changes in config.dynamic.items():
        if re.search(pattern, name):
            return changes is not None and "group_size" not in changes
    return True


def format_problems(shapes: list[LayerShape], config: QuantizeConfig) -> list[str]:
    """Returns one sentence for each kind of layer that the format cannot store, with the way out.

    Args:
        shapes: all linear layers.
        config: settings, with a group size that was given or chosen.
    """
    undivided: dict[int, list[LayerShape]] = defaultdict(list)
    unfilled: dict[int, list[LayerShape]] = defaultdict(list)
    quantized = [*_quantized(shapes, config)]
    for shape, settings in quantized:
        if not group_size_divides(shape.in_features, settings.group_size):
            undivided[settings.group_size].append(shape)
        elif not fills_words(shape.out_features, shape.in_features, settings):
            unfilled[settings.bits].append(shape)
    total = len(quantized)
    sentences = [
        f"group_size={size} does not divide the input channels of {_count(layers, total)}: use "
        f"{_other_size(layers, total, shapes, config)}"
        for size, layers in undivided.items()
    ]
    sentences += [
        f"{bits}-bit codes are stored in multiples of {codes_per_block(bits)}, which the channels of "
        f"{_count(layers, total)} are not: use {_pattern_option('--skip', layers)}"
        for bits, layers in unfilled.items()
    ]
    conv1d = [shape for shape, _ in quantized if shape.is_conv1d]
    if config.format == COMPRESSED_TENSORS and conv1d:
        sentences.append(
            f"{_count(conv1d, total)} are Conv1D, which compressed-tensors does not support: use "
            "--format gptq"
        )
    return sentences


def _quantized(
    shapes: list[LayerShape], config: QuantizeConfig
) -> Iterator[tuple[LayerShape, QuantizeConfig]]:
    for shape in shapes:
        settings = config.for_module(shape.name)
        if settings is not None:
            yield shape, settings


def _count(layers: list[LayerShape], total: int) -> str:
    name, rows, columns, _ = layers[0]
    return f"{len(layers)} of {total} layers (such as {name}, {rows} x {columns})"


def _other_size(
    layers: list[LayerShape], total: int, shapes: list[LayerShape], config: QuantizeConfig
) -> str:
    """Returns the one option that gives all layers a group size that divides their inputs.

    Few layers get a size of their own; if most do not fit, the model gets another one.
    """
    common = [shape.in_features for shape in shapes if _has_common_size(shape.name, config)]
    if 2 * len(layers) > total and (size := _dividing_size(common)) > 0:
        return f"--group-size {size}"
    size = _dividing_size([layer.in_features for layer in layers])
    return _pattern_option("--override", layers, f"=group_size:{size}")


def _dividing_size(widths: list[int]) -> int:
    """Returns the largest group size that divides all widths; -1: none does."""
    fitting = (n for n in KNOWN_SIZES if all(group_size_divides(width, n) for width in widths))
    return next(fitting, -1)


def _pattern_option(option: str, layers: list[LayerShape], change: str = "") -> str:
    """Returns an option with a regular expression for the last parts of the layers' names."""
    last = dict.fromkeys(re.escape(layer.name.rpartition(".")[2]) for layer in layers)
    pattern = f"({'|'.join(last)})$" if len(last) > 1 else f"{next(iter(last))}$"
    return f"{option} '{pattern}{change}'"


def tensor_parallel_degrees(
    linears: Iterable[tuple[int, int, int]], *, hidden: int, heads: int, kv_heads: int
) -> list[int]:
    """Returns the degrees of tensor parallelism at which every rank has whole heads and whole groups.

    Layers that write to the residual stream are split along their input, so each part must be whole
    groups (or 32-channel words without groups); the others are split along their output. Key and value
    heads may be repeated on ranks that outnumber them.

    Args:
        linears: (out_features, in_features, group_size) of each quantized layer.
        hidden: width of the residual stream.
        heads: number of attention heads.
        kv_heads: number of key and value heads.
    """
    layers = list(linears)

    def fits(degree: int) -> bool:
        if heads % degree or (kv_heads % degree and degree % kv_heads):
            return False
        for rows, columns, group_size in layers:
            if rows == hidden:
                divisor = group_size if group_size > 0 else 32
                if columns % degree or (columns // degree) % divisor:
                    return False
            elif rows % degree:
                return False
        return True

    return [degree for degree in TENSOR_PARALLEL_DEGREES if fits(degree)]


def source_lines(streamed: StreamedModel, config: QuantizeConfig) -> list[str]:
    """Returns from which format to which the layers go, if the source is quantized already.

    Args:
        streamed: the model.
        config: settings of the run.

    Returns:
        Lines such as "MXFP4 experts -> 4-bit GPTQ (192)"; none if the source is dense.
    """
    format_name = COMPRESSED_TENSORS if config.format == COMPRESSED_TENSORS else "GPTQ"
    lines: Counter[str] = Counter()
    quantized = {name for block in streamed.blocks for name in block.linears}
    for name, key in streamed.checkpoint_name_of.items():
        info = streamed.checkpoint.tensors[key]
        if stored := stored_as(info):
            layer = name.removesuffix(".weight")
            settings = config.for_module(layer) if layer in quantized else None
            after = (
                f"{settings.bits}-bit {format_name}" if settings else f"{info.dtype}, not quantized"
            )
            lines[f"{stored} {'experts' if parse_expert_name(layer) else 'layers'} -> {after}"] += 1
    return [f"{line} ({count})" for line, count in lines.most_common()]
