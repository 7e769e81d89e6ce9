"""Writes a quantized checkpoint as a GGUF file: its codes in llama.cpp's blocks, without rounding again.

The template is a dense GGUF file of the original model, from llama.cpp's own converter. Its metadata and
the names and order of its tensors are kept. How each tensor is made from the original's is found out
(`origins`), and the codes, scales and zero points of quantized layers go the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from roundwise.errors import ConfigError, OutputError, StrictError
from roundwise.gguf.blocks import (
    BlockedCodes,
    CodeRange,
    block_type,
    blocked_codes,
    pack_blocks,
)
from roundwise.gguf.file import (
    DTYPES,
    REST_TYPES,
    GgufFile,
    GgufTensor,
    PlannedTensor,
    fits_type,
    quantize_values,
)
from roundwise.gguf.origins import Origin, as_matrix, find_origins, placed_rows, rounded
from roundwise.gguf.pair import ModelPair, open_pair
from roundwise.system.activity import announce

#: Ending of the file's name.
SUFFIX = ".gguf"
#: Types that a converter uses where 32 bits are not needed.
HALF = ("F16", "BF16")
#: Most names in one line of a result.
MAX_NAMES = 5


@dataclass(frozen=True)
class GgufResult:
    """A GGUF file that was written."""

    output: Path
    nbytes: int
    bits_per_weight: float
    """Bits of all tensors, divided by their weights."""
    types: dict[str, int]
    """Type -> number of tensors."""
    origins: dict[str, int]
    """Way in which tensors are made from the original's -> number of tensors."""
    notes: list[str]
    """Remarks about tensors that are as asked."""
    issues: list[str]
    """Quantized layers that are not quantized in the file, and why."""

    def as_json(self) -> dict[str, Any]:
        """Returns plain JSON values, named as those of the other conversions."""
        return {
            "output": str(self.output), "to": "gguf", "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight, "types": self.types,
            "origins": self.origins, "notes": self.notes, "issues": self.issues,
        }  # fmt: skip


@dataclass
class _Notes:
    """Names of tensors or layers, by what there is to say about them."""

    notes: dict[str, list[str]] = field(default_factory=dict)
    issues: dict[str, list[str]] = field(default_factory=dict)

    def note(self, text: str, name: str) -> None:
        """Adds a tensor to a note."""
        self.notes.setdefault(text, []).append(name)

    def issue(self, text: str, name: str) -> None:
        """Adds a tensor or layer to an issue."""
        self.issues.setdefault(text, []).append(name)


def convert_to_gguf(
    source: Path,
    out: Path,
    *,
    template: Path,
    original: Path | None = None,
    rest: str | None = None,
    strict: bool = False,
) -> GgufResult:
    """Writes a quantized checkpoint as a GGUF file.

    Args:
        source: folder of a quantized checkpoint of any tool, in GPTQ or compressed-tensors format.
        out: the new file; its name ends in .gguf.
        template: GGUF file of the original model in F32, F16 or BF16.
        original: folder of the model that `source` was made from; None: the one in its manifest.
        rest: type of what is not quantized and has 16 bits in the template, such as q8_0; None: the
            template's.
        strict: raise an error instead of leaving a layer unquantized.

    Raises:
        ConfigError: an argument is invalid, the `gguf` package is missing, or a tensor that was changed
            with the layers, by a rotation for example, has no known place in the template.
        CheckpointError: a file is damaged, or the files are not of one model.
        OutputError: `out` exists.
        StrictError: `strict`, and a layer cannot be written as it is.
        StorageError: the disk is full or failed.
    """
    rest_type = _check_arguments(out, rest)
    file = GgufFile(template)
    if rest_type and not any(tensor.type in HALF for tensor in file.tensors.values()):
        raise ConfigError(
            f"--rest needs a template in F16 or BF16, which shows what may be smaller: make {template} "
            "again with --outtype f16"
        )
    pair = open_pair(source, original)
    dense = {name: t.values() for name, t in file.tensors.items() if t.type in DTYPES}
    origins = find_origins(dense, pair.original)
    notes = _Notes()
    _check_places(file, pair, origins, notes)
    tensors = []
    for index, tensor in enumerate(file.tensors.values()):
        announce("comparing layers with the original", index, len(file.tensors))
        tensors.append(_plan(tensor, origins.get(tensor.name), pair, rest_type, notes))
    issues = _lines(notes.issues)
    if strict and issues:
        raise StrictError(f"--strict: {issues[0]}")
    out.parent.mkdir(parents=True, exist_ok=True)
    file.write_like(out, tensors, _file_type(tensors))
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return GgufResult(
        output=out, nbytes=out.stat().st_size,
        bits_per_weight=8 * nbytes / sum(t.numel for t in file.tensors.values()),
        types=dict(Counter(tensor.type for tensor in tensors)),
        origins=dict(Counter(origin.kind() for origin in origins.values())),
        notes=_lines(notes.notes), issues=issues,
    )  # fmt: skip


def _check_arguments(out: Path, rest: str | None) -> str | None:
    """Returns the type of the rest as GGUF names it; Raises as `convert_to_gguf`."""
    if out.suffix != SUFFIX:
        raise ConfigError(f"--to gguf writes one file: name it like model{SUFFIX}, not {out}")
    if out.exists():
        raise OutputError(f"{out} exists: choose another name")
    if rest is not None and rest.upper() not in REST_TYPES:
        known = ", ".join(name.lower() for name in REST_TYPES)
        raise ConfigError(f"--rest {rest!r} is not supported: use {known}")
    return rest.upper() if rest is not None else None


def _check_places(
    file: GgufFile, pair: ModelPair, origins: Mapping[str, Origin], notes: _Notes
) -> None:
    """Notes which tensors and layers have no known place.

    Raises:
        ConfigError: none of the layers has one, or one has none that a rotation changed.
    """
    placed = placed_rows(origins.values())
    rows = {layer: placed.get(f"{layer}.weight", 0) for layer in pair.layers}
    if not any(rows.values()):
        raise ConfigError(
            f"no quantized layer was found in {file.path}: it must be made from the same model as "
            f"{pair.checkpoint.folder}, in F32, F16 or BF16"
        )
    changed = [name for name in pair.changed if name not in placed]
    if changed:
        raise ConfigError(
            f"{changed[0]} differs from the original's, and its place in {file.path} is not known: the "
            "file would mix two models (a tied head that was untied by a rotation, for example)"
        )
    unknown = [tensor for tensor in file.tensors.values() if tensor.name not in origins]
    matrices = [tensor.name for tensor in unknown if len(tensor.shape) > 1]
    if pair.is_rotated and matrices:
        raise ConfigError(
            f"{pair.checkpoint.folder} is rotated, and how {matrices[0]} of {file.path} is made from "
            "the original is not known: quantize without --rotate for llama.cpp"
        )
    for layer, count in rows.items():
        if count < pair.layers[layer].out_features:
            part = "only a part of it was" if count else "not"
            notes.issue(f"{part} found in the template", layer)
    for tensor in unknown:
        notes.note("not found in the original, so as in the template", tensor.name)


def _plan(
    tensor: GgufTensor, origin: Origin | None, pair: ModelPair, rest: str | None, notes: _Notes
) -> PlannedTensor:
    """Returns how a tensor of the result is made.

    Args:
        tensor: the tensor of the template.
        origin: how it is made from the original's; None: not known.
        pair: the checkpoint and its original.
        rest: type of what is not quantized; None: the template's.
        notes: takes what is to be said about the tensor.
    """
    if origin is None:
        return PlannedTensor(tensor.name, tensor.type, tensor.shape, lambda: tensor.stored)
    layers = [name.removesuffix(".weight") for name in origin.sources]
    are_quantized = [layer in pair.layers for layer in layers]
    if not any(are_quantized):
        return _plan_rest(tensor, origin, pair, rest, notes)
    reason = "it is joined with weights that are not quantized"
    if all(are_quantized):
        planned = _plan_blocks(tensor, origin, layers, pair, notes)
        if isinstance(planned, PlannedTensor):
            return planned
        reason = planned
    notes.issue(f"dequantized to {tensor.type}, because {reason}", tensor.name)
    dtype = DTYPES[tensor.type]
    return PlannedTensor(
        tensor.name, tensor.type, tensor.shape, lambda: _values(origin, pair, dtype)
    )


def _plan_rest(
    tensor: GgufTensor, origin: Origin, pair: ModelPair, rest: str | None, notes: _Notes
) -> PlannedTensor:
    """Returns how a tensor that is not quantized is made: as in the template unless it was changed."""
    dtype = DTYPES[tensor.type]

    def values() -> torch.Tensor:
        if any(name in pair.changed for name in origin.sources):
            return _values(origin, pair, dtype)
        return as_matrix(tensor.values())

    if rest is None or rest == tensor.type or tensor.type not in HALF or len(tensor.shape) < 2:
        return PlannedTensor(tensor.name, tensor.type, tensor.shape, values)
    if not fits_type(rest, tensor.shape[-1]):
        notes.note(f"kept in {tensor.type}: rows are not whole blocks of {rest}", tensor.name)
        return PlannedTensor(tensor.name, tensor.type, tensor.shape, values)
    return PlannedTensor(tensor.name, rest, tensor.shape, lambda: quantize_values(values(), rest))


def _plan_blocks(
    tensor: GgufTensor, origin: Origin, layers: list[str], pair: ModelPair, notes: _Notes
) -> PlannedTensor | str:
    """Returns how a tensor is made of the codes of quantized layers, or why it cannot be."""
    if len(tensor.shape) < 2:
        return "llama.cpp reads vectors in 32 bits"
    offsets = None
    for layer in layers:
        q = pair.read(layer)
        blocked = blocked_codes(q, origin.columns)
        if isinstance(blocked, str):
            return blocked
        if not torch.equal(
            q.scales.to(torch.float16).to(torch.float32), q.scales.to(torch.float32)
        ):
            notes.note("scales are rounded to float16", layer)
        of_layer = CodeRange.of(q)
        offsets = of_layer if offsets is None else offsets.join(of_layer)
    assert offsets is not None
    kind = block_type(offsets)
    if kind is None:
        return f"no type of blocks holds asymmetric codes of {offsets.bits} bits exactly"

    def compute() -> torch.Tensor:
        return pack_blocks(_blocked(origin, pair), kind)

    if not origin.is_certain(as_matrix(tensor.values()), compute):
        return "equal rows of the original have different codes, so their order is not known"
    if kind.has_minimum:
        notes.note(f"{kind.name}: the minimum, -scale · zero, is rounded to float16", tensor.name)
    return PlannedTensor(tensor.name, kind.name, tensor.shape, compute)


def _blocked(origin: Origin, pair: ModelPair) -> BlockedCodes:
    """Returns the codes of a tensor, with a scale and a zero point per block."""
    parts = {}
    for name in origin.sources:
        blocked = blocked_codes(pair.layers[name.removesuffix(".weight")].read(), origin.columns)
        assert isinstance(blocked, BlockedCodes)  # planned
        parts[name] = blocked
    return BlockedCodes(
        origin.assemble(lambda name: parts[name].codes),
        origin.assemble(lambda name: parts[name].scales),
        origin.assemble(lambda name: parts[name].zeros),
    )


def _values(origin: Origin, pair: ModelPair, dtype: torch.dtype) -> torch.Tensor:
    """Returns the values of a tensor from the checkpoint: dequantized, or as they were changed."""

    def matrix(name: str) -> torch.Tensor:
        layer = name.removesuffix(".weight")
        if layer in pair.layers:  # [out, in], as in every GGUF file
            W = pair.read(layer).dequantize()
            values = W if origin.columns is None else W[:, origin.columns]
        else:
            values = origin.read((pair.changed.get(name) or pair.original[name]).read())
        return rounded(values, dtype)

    return origin.assemble(matrix)


def _file_type(tensors: Iterable[PlannedTensor]) -> str:
    """Returns the type of most weights."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.type] += tensor.numel
    return weights.most_common(1)[0][0]


def _lines(names_of: Mapping[str, list[str]]) -> list[str]:
    """Returns one line per text, with the first of its names."""
    lines = []
    for text, names in names_of.items():
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        lines.append(f"{', '.join(names[:MAX_NAMES])}{more}: {text}")
    return lines
