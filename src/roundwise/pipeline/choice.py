"""Which width each unit gets: the classic choice under a budget.

From the smallest option of each unit, whatever lowers the loss most per byte comes next, until the size
is used up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from roundwise.config import QuantizeConfig
from roundwise.errors import ConfigError
from roundwise.models.joint import with_joints


@dataclass(frozen=True)
class Option:
    """One way to quantize a unit."""

    bits: int
    group_size: int
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Unit:
    """Layers of one block that are quantized in the same way."""

    names: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Choice:
    """What was chosen for a unit."""

    names: tuple[str, ...]
    bits: int
    group_size: int
    loss: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "names": list(self.names)}


def choose(units: Sequence[Unit], target: float) -> list[Choice]:
    """The options that lose least among those whose bytes stay within `target` bits per weight.

    Raises:
        ConfigError: even the smallest options are larger; naming what they take.
    """
    budget = target * sum(unit.weights for unit in units) / 8
    chosen = [min(unit.options, key=lambda o: (o.nbytes, o.loss)) for unit in units]
    spent = sum(option.nbytes for option in chosen)
    if spent > budget:
        least = 8 * spent / sum(unit.weights for unit in units)
        raise ConfigError(
            f"target_bpw={target:g} cannot be reached: the smallest options take {least:.2f} bits"
        )
    while True:
        best: tuple[float, int, Option] | None = None
        for index, (unit, now) in enumerate(zip(units, chosen, strict=True)):
            for option in unit.options:
                more, gain = option.nbytes - now.nbytes, now.loss - option.loss
                if gain <= 0 or spent + more > budget:
                    continue
                rate = gain / more if more > 0 else float("inf")
                if best is None or rate > best[0]:
                    best = (rate, index, option)
        if best is None:
            break
        _, index, option = best
        spent += option.nbytes - chosen[index].nbytes
        chosen[index] = option
    return [
        Choice(unit.names, option.bits, option.group_size, option.loss)
        for unit, option in zip(units, chosen, strict=True)
    ]


def as_dynamic(choices: Sequence[Choice]) -> dict[str, dict[str, Any] | None]:
    """`QuantizeConfig.dynamic` for the choices: one pattern for all layers that are quantized alike.

    Layers that an engine joins are also called what it calls them.
    """
    alike: dict[tuple[int, int], list[str]] = {}
    for choice in choices:
        alike.setdefault((choice.bits, choice.group_size), []).extend(choice.names)
    return {
        f"^(?:{'|'.join(map(re.escape, with_joints(names)))})$": {"bits": bits, "group_size": size}
        for (bits, size), names in sorted(alike.items())
    }


def is_open(name: str, config: QuantizeConfig) -> bool:
    """Whether no override of the user's settles a layer."""
    return not any(re.search(pattern, name) for pattern in config.dynamic)
