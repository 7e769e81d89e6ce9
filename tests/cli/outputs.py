"""What the command tests check about every command's output."""

from __future__ import annotations

import json
from typing import Any

from tests.helpers import Ended


def only_json(ended: Ended) -> Any:
    """Returns the one object on stdout of a command that succeeded."""
    assert ended.code == 0, ended.stderr
    value, end = json.JSONDecoder().raw_decode(ended.stdout)
    assert not ended.stdout[end:].strip()
    return value
