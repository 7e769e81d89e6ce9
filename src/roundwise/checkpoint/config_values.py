"""Reads single values of a quantization config, which tools write in different spellings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import regex

from roundwise.errors import CheckpointError, first_line, quoted

#: Settings with two names: the one that is written -> the other one.
ALIASES = {"quant_method": "method", "checkpoint_format": "format"}
#: Seconds that a pattern may take on one name.
PATTERN_SECONDS = 1.0
TRUE, FALSE = ("true", "1"), ("false", "0")


@dataclass(frozen=True)
class LayerConfig:
    """Settings of a layer according to the config; None: the config does not say."""

    bits: int | None
    group_size: int | None
    """Input channels per group; -1: one group for all."""
    sym: bool | None
    desc_act: bool | None

    def known(self) -> dict[str, Any]:
        """Returns the settings that the config says, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def whole_number(settings: Mapping[str, Any], key: str) -> int | None:
    """Returns a whole number that may be written as a text or with a decimal point."""
    value = settings.get(key)
    if value is None:
        return None
    try:
        number = int(value) if not isinstance(value, bool | list | dict) else None
        if number is not None and (isinstance(value, str) or number == value):
            return number
    except (ValueError, OverflowError):
        pass
    raise unknown_value(key, value, "a whole number")


def flag(settings: Mapping[str, Any], key: str) -> bool | None:
    """Returns a truth value that may be written as a text or a number."""
    value = settings.get(key)
    if value is None or isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text not in (*TRUE, *FALSE):
        raise unknown_value(key, value, "true or false")
    return text in TRUE


def word(settings: Mapping[str, Any], key: str, default: str) -> str:
    """Returns a word in small letters; a setting with two names must not have two values."""
    values = {}
    for name in (key, ALIASES.get(key)):
        value = settings.get(name) if name else None
        if value is None:
            continue
        if not isinstance(value, str):
            raise unknown_value(str(name), value, "a text")
        values[name] = value.strip().lower()
    if len({*values.values()}) > 1:
        said = " and ".join(f"{name}={quoted(value)}" for name, value in values.items())
        raise CheckpointError(
            f"the quantization config says both {said}: remove the one that is wrong"
        )
    return next(iter(values.values()), default) or default


def unknown_value(key: str, value: Any, expected: str) -> CheckpointError:
    """Returns the error about a value that is not known."""
    return CheckpointError(
        f"the quantization config says {key}={quoted(str(value))}: it must be {expected}"
    )


def check_pattern(pattern: str) -> None:
    """Checks that a pattern of a config is a regular expression.

    Raises:
        CheckpointError: it is not.
    """
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"the quantization config has the pattern {quoted(pattern)}, which is not a regular "
            f"expression: {first_line(error)}"
        ) from None


def matches(pattern: str, name: str) -> bool:
    """Tells whether a pattern of a config matches a name from its start.

    Raises:
        CheckpointError: the pattern is not a regular expression, or takes too long.
    """
    check_pattern(pattern)
    try:
        return regex.match(pattern, name, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        raise CheckpointError(
            f"the quantization config has a pattern that takes too long on {quoted(name)}: "
            f"{quoted(pattern)}"
        ) from None
