"""Layers that engines compute as one, and ask the settings of by one name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from roundwise.config import QuantizeConfig

#: What vLLM computes as one.
JOINTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def joints(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Joint names of layers that are all there, with their members."""
    given = [*names]
    known = {*given}
    for joint, members in JOINTS.items():
        for name in given:
            stem, dot, last = name.rpartition(".")
            whole = [f"{stem}{dot}{member}" for member in members]
            if last == members[0] and known.issuperset(whole):
                yield f"{stem}{dot}{joint}", whole


def with_joints(names: Iterable[str]) -> list[str]:
    """Names of layers, and what engines that join some of them ask for instead."""
    given = list(names)
    return list(dict.fromkeys([*given, *(joint for joint, _ in joints(given))]))


def joint_rules(config: QuantizeConfig, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Rules for joint names, where no pattern gives them the settings that all their layers have."""
    alike: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for joint, members in joints(names):
        wanted = [config.for_module(member) for member in members]
        if wanted[0] == config.for_module(joint) or any(each != wanted[0] for each in wanted):
            continue
        kind = wanted[0]
        changes = {} if kind is None else kind.model_dump(include={"bits", "group_size", "sym"})
        alike.setdefault(repr(changes), ([], changes))[0].append(joint)
    return {
        f"{'+' if changes else '-'}:(?:{'|'.join(map(re.escape, found))})$": changes
        for found, changes in alike.values()
    }


def split_joints(config: QuantizeConfig, names: Iterable[str]) -> list[str]:
    """Joint names whose layers have not all the same settings."""
    return [
        joint
        for joint, members in joints(names)
        if any(config.for_module(member) != config.for_module(members[0]) for member in members)
    ]
