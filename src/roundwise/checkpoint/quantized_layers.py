"""The quantized layers of a checkpoint in either format, held against its config and each other.

Everything that reads packed codes finds its layers here, so that no reader takes tensors that contradict
the config or each other: `quantized_layers` compares the headers (types, shapes, widths, groups),
`QuantizedLayer.check` compares what only the data shows (scales, zero points, groups of channels).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from roundwise.checkpoint import compressed_tensors, gptq_format
from roundwise.checkpoint.config_values import LayerConfig
from roundwise.checkpoint.formats import GPTQ, PACK_QUANTIZED, Layout, layout_of
from roundwise.checkpoint.quantization_config import (
    MARLIN_ADVICE,
    Format,
    QuantizationConfig,
    read_quantization_config,
)
from roundwise.checkpoint.reader import Checkpoint, TensorInfo
from roundwise.core.quantized_weight import WIDTHS, QuantizedWeight, codes_per_block
from roundwise.errors import CheckpointError

#: Suffix of the codes in Marlin's layout; scales are in `s`.
MARLIN = ("B", "s")


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized linear layer whose tensors fit together and fit the config."""

    name: str
    tensors: dict[str, TensorInfo]
    """The packed tensors by suffix, such as qweight; not the bias."""
    has_bias: bool
    config: LayerConfig
    """Settings of the layer according to the config."""
    checkpoint_format: Format
    bits: int
    group_size: int
    """Input channels per group; the last group may have fewer."""
    in_features: int
    out_features: int

    @property
    def layout(self) -> Layout:
        """Names and types of the layer's tensors."""
        return layout_of(self.checkpoint_format)

    @property
    def format(self) -> str:
        """Usual name of the format."""
        return f"{self.bits}-bit GPTQ" if self.layout is GPTQ else f"INT{self.bits}"

    @property
    def groups(self) -> int:
        """Number of groups."""
        shape = self.tensors[self.layout.scales].shape
        return shape[0] if self.layout is GPTQ else shape[1]

    def read(self) -> QuantizedWeight:
        """Returns the layer's codes, scales and zero points.

        Raises:
            CheckpointError: as for `check`.
        """
        self.check()
        tensors = {suffix: info.read() for suffix, info in self.tensors.items()}
        if self.checkpoint_format == "compressed-tensors":
            shape = (self.out_features, self.in_features)
            return compressed_tensors.decode(
                tensors, bits=self.bits, group_size=self.group_size, shape=shape
            )
        return gptq_format.decode(
            tensors, self.checkpoint_format, bits=self.bits, group_size=self.group_size
        )

    def check(self) -> None:
        """Checks the layer's scales, zero points and groups; reads no codes.

        Raises:
            CheckpointError: a scale is zero or not finite, a zero point is not in the middle although
                the config says sym, or groups do not fit the layer or the config.
        """
        if self.layout.g_idx in self.tensors:
            _check_groups(self, self.tensors[self.layout.g_idx].read())
        _check_values(self, self.tensors[self.layout.scales].read(), self._zeros())

    def _zeros(self) -> torch.Tensor:
        info = self.tensors.get(self.layout.zeros)
        words = info.read() if info is not None else None
        if self.checkpoint_format == "compressed-tensors":
            shape = (self.out_features, self.groups)
            return compressed_tensors.decode_zeros(words, self.bits, shape)
        assert words is not None  # it is required
        return gptq_format.decode_zeros(words, self.checkpoint_format, self.bits)


def quantized_layers(checkpoint: Checkpoint) -> list[QuantizedLayer]:
    """Returns all quantized layers of a checkpoint; reads headers and shapes only.

    Raises:
        CheckpointError: the config cannot be read, or tensors contradict it or each other.
    """
    return find_layers(checkpoint.tensors, read_quantization_config(checkpoint))


def find_layers(
    tensors: Mapping[str, TensorInfo], config: QuantizationConfig
) -> list[QuantizedLayer]:
    """Returns all quantized layers among some tensors, found by their codes; reads headers and shapes.

    Args:
        tensors: all tensors of a checkpoint by name.
        config: its quantization config.

    Raises:
        CheckpointError: tensors are missing, or contradict the config or each other.
    """
    for tensor in tensors:
        name, _, suffix = tensor.rpartition(".")
        if suffix == MARLIN[0] and f"{name}.{MARLIN[1]}" in tensors:
            raise CheckpointError(f"{name} {MARLIN_ADVICE}")
    suffix = f".{layout_of(config.checkpoint_format).codes}"
    names = [tensor.removesuffix(suffix) for tensor in tensors if tensor.endswith(suffix)]
    return [_layer(name, tensors, config) for name in names]


def _layer(
    name: str, tensors: Mapping[str, TensorInfo], config: QuantizationConfig
) -> QuantizedLayer:
    layout = layout_of(config.checkpoint_format)
    parts = _parts(name, tensors, layout)
    shapes = {suffix: info.shape for suffix, info in parts.items()}
    settings = config.for_layer(name)
    if layout is GPTQ:
        bits, in_features, out_features = _sizes(name, shapes)
        groups = shapes["scales"][0]
    else:
        stated_bits = next((each.bits for each in settings if each is not None), None)
        bits, in_features, out_features = _packed_sizes(name, parts, stated_bits)
        groups = shapes[compressed_tensors.SCALE][1]
    _check_shapes(name, shapes, {layout.g_idx: (in_features,), "bias": (out_features,)})
    failures = []
    for stated in settings:
        failure = _contradiction(stated, bits, in_features, groups)
        if failure is None and stated is not None:
            size = _group_size(name, stated, in_features, groups, parts, layout)
            has_bias = parts.pop("bias", None) is not None
            layer = QuantizedLayer(
                name, parts, has_bias, stated, config.checkpoint_format, bits, size, in_features,
                out_features,
            )  # fmt: skip
            if layout is PACK_QUANTIZED and stated.sym is False and layout.zeros not in parts:
                raise CheckpointError(
                    f"{name} has no {layout.zeros}, but the config says symmetric=false"
                )
            return layer
        failures.append(failure)
    raise CheckpointError(
        f"{name} {failures[0]}: the quantization config belongs to other files, or was changed"
    )


def _parts(name: str, tensors: Mapping[str, TensorInfo], layout: Layout) -> dict[str, TensorInfo]:
    """Returns the tensors of a layer by suffix, with its bias.

    Raises:
        CheckpointError: one is missing, is of another type, or there is a dense weight too.
    """
    parts = {
        suffix: tensors[f"{name}.{suffix}"]
        for suffix in layout.types
        if f"{name}.{suffix}" in tensors
    }
    missing = {*layout.required} - set(parts)
    if missing:
        raise CheckpointError(f"{name} lacks {', '.join(sorted(missing))}")
    if f"{name}.weight" in tensors:
        raise CheckpointError(
            f"{name} has both packed codes and a weight: remove the one that is wrong"
        )
    for suffix, info in parts.items():
        if info.dtype not in layout.types[suffix]:
            raise CheckpointError(
                f"{name}.{suffix} is {info.dtype}, but must be {' or '.join(layout.types[suffix])}"
            )
    return parts


def _sizes(name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int, int]:
    """Returns width of the codes, input channels and output channels of a GPTQ layer.

    Raises:
        CheckpointError: the shapes contradict each other.
    """
    if any(len(shapes[suffix]) != 2 or 0 in shapes[suffix] for suffix in GPTQ.required):
        raise CheckpointError(f"{name}: qweight, qzeros and scales must be matrices")
    (words, rows), (groups, zero_words), (scale_rows, columns) = (shapes[s] for s in GPTQ.required)
    bits, remainder = divmod(zero_words * 32, columns)
    if remainder or bits not in WIDTHS or groups != scale_rows:
        raise _mismatch(name, "qzeros", "scales", shapes)
    if rows != columns:
        raise _mismatch(name, "qweight", "scales", shapes)
    in_features = words * 32 // bits
    per_block = codes_per_block(bits)
    if words * 32 % bits or in_features % per_block or columns % per_block or groups > in_features:
        raise _mismatch(name, "qweight", "qzeros", shapes)
    return bits, in_features, columns


def _packed_sizes(
    name: str, parts: dict[str, TensorInfo], stated_bits: int | None
) -> tuple[int, int, int]:
    """Returns width of the codes, input channels and output channels of a compressed-tensors layer.

    Raises:
        CheckpointError: the shapes contradict each other.
    """
    shapes = {suffix: info.shape for suffix, info in parts.items()}
    packed, scale, shape = PACK_QUANTIZED.required
    if shapes[shape] != (2,):
        raise CheckpointError(f"{name}.{shape} does not hold two numbers")
    if any(len(shapes[suffix]) != 2 or 0 in shapes[suffix] for suffix in (packed, scale)):
        raise CheckpointError(f"{name}: {packed} and {scale} must be matrices")
    rows, columns = (int(size) for size in parts[shape].read())
    if not shapes[packed][0] == shapes[scale][0] == rows:
        raise CheckpointError(
            f"{name}: {packed} {list(shapes[packed])}, {scale} {list(shapes[scale])} and {shape} "
            f"{[rows, columns]} do not fit together"
        )
    bits = compressed_tensors.width_of(shapes[packed][1], columns, stated_bits)
    if bits is None or shapes[scale][1] > columns:
        known = ", ".join(map(str, WIDTHS))
        raise CheckpointError(
            f"{name}: {packed} {list(shapes[packed])} does not fit {columns} codes of {known} bits "
            "(compressed-tensors before 0.18 packed odd widths in another way)"
        )
    zeros = (compressed_tensors.packed_words(rows, bits), shapes[scale][1])
    _check_shapes(name, shapes, {PACK_QUANTIZED.zeros: zeros})
    return bits, columns, rows


def _check_shapes(
    name: str, shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    """Checks the shapes of those tensors that follow from the others."""
    for suffix, shape in expected.items():
        if suffix in shapes and shapes[suffix] != shape:
            raise CheckpointError(
                f"{name}.{suffix} has shape {[*shapes[suffix]]}, but the other tensors of the layer "
                f"require {[*shape]}"
            )


def _mismatch(
    name: str, first: str, second: str, shapes: dict[str, tuple[int, ...]]
) -> CheckpointError:
    return CheckpointError(
        f"{name}: {first} {[*shapes[first]]} and {second} {[*shapes[second]]} do not fit together"
    )


def _contradiction(
    stated: LayerConfig | None, bits: int, in_features: int, groups: int
) -> str | None:
    """Returns how a layer's shapes contradict settings of the config; None if they do not."""
    if stated is None:
        return "has packed codes, but the config says that it is not quantized"
    if stated.bits not in (None, bits):
        return f"has codes of {bits} bits, but the config says bits={stated.bits}"
    size = in_features if stated.group_size == -1 else stated.group_size
    if size is not None and -(-in_features // size) != groups:
        return (
            f"has {groups} {'group' if groups == 1 else 'groups'} of its {in_features} input channels, "
            f"but the config says group_size={stated.group_size}"
        )
    return None


def _group_size(
    name: str, stated: LayerConfig, in_features: int, groups: int, parts: dict[str, TensorInfo],
    layout: Layout,
) -> int:  # fmt: skip
    """Returns the input channels per group.

    Raises:
        CheckpointError: neither the config nor g_idx says which channels are in a group.
    """
    if groups == 1:
        return in_features
    if stated.group_size is not None:
        return stated.group_size
    if layout.g_idx in parts:
        return int(torch.bincount(parts[layout.g_idx].read().long().clamp(min=0)).max())
    if layout is PACK_QUANTIZED:  # its groups are all of one size
        return -(-in_features // groups)
    raise CheckpointError(
        f"{name} has {groups} groups and no g_idx, and the config has no group_size: add it"
    )


def _check_groups(layer: QuantizedLayer, g_idx: torch.Tensor) -> None:
    """Checks the group of each input channel, g_idx [in]; Raises as for `QuantizedLayer.check`."""
    name, groups = layer.name, layer.groups
    low, high = (int(end) for end in torch.aminmax(g_idx))
    if low < 0 or high >= groups:
        raise CheckpointError(
            f"{name}.g_idx has groups {low} … {high}, but the layer has {groups} groups"
        )
    largest = int(torch.bincount(g_idx.long(), minlength=groups).max())
    if largest > layer.group_size:
        raise CheckpointError(
            f"{name}.g_idx puts {largest} channels into a group of {layer.group_size}"
        )
    in_order = torch.arange(layer.in_features) // layer.group_size
    if layer.config.desc_act is False and not bool((g_idx == in_order).all()):
        raise CheckpointError(
            f"{name}.g_idx is in act-order, but the config says desc_act is off: set desc_act to true "
            "if these are the right files"
        )


def _check_values(layer: QuantizedLayer, scales: torch.Tensor, zeros: torch.Tensor) -> None:
    """Checks scales and zero points (without the file's offset); Raises as for `QuantizedLayer.check`.

    Negative scales are valid: they mirror a symmetric range, which has one more code below zero.
    """
    if not bool(torch.isfinite(scales).all()) or not bool((scales != 0).all()):
        raise CheckpointError(f"{layer.name} has a scale that is zero or not finite")
    middle = 2 ** (layer.bits - 1)
    if not layer.config.sym or bool((zeros == middle).all()):
        return
    if layer.layout is PACK_QUANTIZED:
        raise CheckpointError(
            f"{layer.name} has zero points beside the middle, but the config says symmetric=true"
        )
    other, offset = ("gptq_v2", 1) if layer.checkpoint_format == "gptq" else ("gptq", -1)
    is_other = bool((zeros == middle + offset).all())
    fix = f"checkpoint_format to {other}" if is_other else "sym to false"
    raise CheckpointError(
        f"{layer.name} has zero points other than {middle}, but the config says sym=true and "
        f"checkpoint_format={layer.checkpoint_format}: set {fix} if these are the right files"
    )
