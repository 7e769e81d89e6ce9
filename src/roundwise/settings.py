"""Settings: base class of all settings, and how a field becomes a command-line option."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from roundwise.errors import ConfigError


class Panel(StrEnum):
    """Panel of a setting in `roundwise quantize --help`; they appear in this order."""

    MODEL = "Model and output"
    FORMAT = "Format"
    CALIBRATION = "Calibration"
    RECIPE = "Recipe (for experts)"
    MEMORY = "Memory and devices"
    RUN = "Run"


@dataclass(frozen=True)
class Flags:
    """Command-line options of a setting that is not given as `--its-name VALUE`."""

    options: dict[str, str]
    """Declaration, such as "--sym/--asym" -> help text; empty: the field's description."""


class Settings(BaseModel):
    """Base of all settings: immutable; raises `ConfigError` instead of pydantic's error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(_describe_errors(error, type(self))) from None


def _describe_errors(error: ValidationError, kind: type[BaseModel]) -> str:
    """Returns one sentence per invalid setting, without pydantic's vocabulary."""
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            lines.append(f"there is no setting {name!r}; settings are {known}")
        elif item["type"] == "literal_error":
            expected = item.get("ctx", {}).get("expected", "")
            lines.append(f"{name}={item['input']!r} is not supported: use {expected}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{name}={item['input']!r}: {message}" if name else message)
    return "; ".join(lines)
