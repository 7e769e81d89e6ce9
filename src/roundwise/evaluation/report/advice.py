"""Options to copy for layers that lose much: outliers, the first blocks, and query and key projections.

Their patterns match these layers and no others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from roundwise.checkpoint.engines import PACKED_MODULES_MAPPING
from roundwise.checkpoint.manifest import LayerRecord

#: Names of query and key projections, alone or fused with the values.
QUERY_AND_KEY = frozenset({
    "q_proj", "k_proj", "query", "key", "q_lin", "k_lin", "wq", "wk", "q", "k",
    "qkv_proj", "query_key_value", "c_attn", "Wqkv",
})  # fmt: skip
#: Part of the blocks that counts as the first ones, at least one block.
FIRST_PART = 16
#: Times the error of the other layers from which something should be done.
NOTABLE = 2.0
#: Bits that more bits are.
MORE_BITS = 8


@dataclass(frozen=True)
class SensitiveLayers:
    """Layers of a kind that often lose more than others, and what they lost in this run."""

    title: str
    count: int
    """Number of layers."""
    error: float
    """Geometric mean of their relative output errors."""
    others: float
    """The same of all other layers."""
    option: str | None
    """Option that gives them more bits; None: they have them."""

    @property
    def ratio(self) -> float:
        """Their error as a multiple of that of the others."""
        return self.error / self.others

    @property
    def is_notable(self) -> bool:
        """True if something should be done about them."""
        return self.ratio >= NOTABLE


def sensitive_layers(layers: Sequence[LayerRecord], blocks: Sequence[str]) -> list[SensitiveLayers]:
    """Compares what the first blocks, and query and key projections, lost compared with the others.

    Args:
        layers: all quantized layers.
        blocks: names of the blocks in order.
    """
    count = max(1, len(blocks) // FIRST_PART)
    first = {f"{block}." for block in blocks[:count]}
    title = "the first block" if count == 1 else f"the first {count} blocks"
    groups = {
        f"{title} of {len(blocks)}": {x.name for x in layers if x.name.startswith(tuple(first))},
        "query and key projections": {
            x.name for x in layers if x.name.rpartition(".")[2] in QUERY_AND_KEY
        },
    }
    found = []
    for name, members in groups.items():
        inside = [layer for layer in layers if layer.name in members]
        outside = [layer for layer in layers if layer.name not in members]
        errors = [
            [layer.relative_error for layer in part if layer.relative_error]
            for part in (inside, outside)
        ]
        if all(errors):
            found.append(
                SensitiveLayers(
                    name, len(inside), geometric_mean(errors[0]), geometric_mean(errors[1]),
                    override(inside, layers),
                )
            )  # fmt: skip
    return found


def override(chosen: Iterable[LayerRecord], layers: Iterable[LayerRecord]) -> str | None:
    """Returns the option that gives layers more bits, to copy into a shell; None: they have them.

    Layers that engines fuse (q, k and v) need the same settings, so the others come along.

    Args:
        chosen: the layers.
        layers: all quantized layers.
    """
    known = {layer.name: layer.bits for layer in layers}
    names: dict[str, None] = {}
    for layer in chosen:
        parent, dot, last = layer.name.rpartition(".")
        fused = next((m for m in PACKED_MODULES_MAPPING.values() if last in m), (last,))
        for member in fused:
            name = f"{parent}{dot}{member}"
            if known.get(name, MORE_BITS) < MORE_BITS:
                names[name] = None
    return f"--override '^{_pattern([*names])}$=bits:{MORE_BITS}'" if names else None


def _pattern(names: Sequence[str]) -> str:
    """Returns a regular expression that matches some names and no others.

    Blocks with the same layers share a part: model.layers.(?:0|1).mlp.(?:up_proj|down_proj).
    """
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..+)", name, re.DOTALL)
        begin, number, end = match.groups() if match else (name, "", "")
        numbers.setdefault((begin, end), []).append(number)
    ends: dict[tuple[str, str], list[str]] = {}
    for (begin, end), found in numbers.items():
        ends.setdefault((begin, _one_of(found)), []).append(re.escape(end))
    return _one_of([f"{re.escape(begin)}{found}{_one_of(e)}" for (begin, found), e in ends.items()])


def _one_of(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"
