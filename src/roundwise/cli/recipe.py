"""Recipe files: the options of a command in YAML, read with --config and printed with --print-config."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roundwise.errors import ConfigError
from roundwise.settings import Settings


def read_recipe(path: Path, known: Mapping[str, bool]) -> dict[str, Any]:
    """Returns the options of a recipe file, by the names of the command's parameters.

    Args:
        path: YAML file of options, such as `group-size: 64`; dashes and underscores are the same.
        known: parameters that a file may set -> True if one can be given several times.

    Raises:
        ConfigError: the file is not a mapping of options, or names one that does not exist.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML: {reason}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a list of options such as `group-size: 64`")
    options = {str(name).replace("-", "_"): value for name, value in content.items()}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {_spelled(near[0])}?" if near else ""
            raise ConfigError(f"{path}: there is no option {_spelled(name)}{hint}")
    return {
        name: ",".join(map(str, value)) if isinstance(value, list) and not known[name] else value
        for name, value in options.items()
        if value is not None
    }


def recipe_text(calibration: str | None, settings: list[Settings]) -> str:
    """Returns the recipe file of a command, with every setting that has a value.

    Args:
        calibration: its calibration text.
        settings: its settings.
    """
    import yaml

    options: dict[str, Any] = {"calibration": calibration}
    for each in settings:
        values = each.model_dump(mode="json")
        for pattern, changes in values.pop("dynamic", {}).items():
            if changes is None:
                options.setdefault("skip", []).append(pattern)
            else:
                text = ",".join(f"{name}:{value}" for name, value in changes.items())
                options.setdefault("override", []).append(f"{pattern}={text}")
        options |= {
            name: ",".join(map(str, value)) if isinstance(value, list) else value
            for name, value in values.items()
            if name in _kept(each)
        }
    given = {_spelled(name): value for name, value in options.items() if value is not None}
    return str(yaml.safe_dump(given, sort_keys=False, allow_unicode=True))


def _kept(settings: Settings) -> set[str]:
    """Returns the fields to print: not a group size that the model decides."""
    left_open = {"group_size"} if getattr(settings, "chooses_group_size", False) else set()
    return {*type(settings).model_fields} - left_open


def _spelled(name: str) -> str:
    return name.replace("_", "-")
