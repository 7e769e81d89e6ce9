"""Fixtures: the bundled model in float32, and a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.calibration.sources import read_text


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    return rw.load(tiny, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids(loaded: tuple[Any, Any]) -> list[int]:
    """Some hundred tokens of text."""
    text = read_text("python-stdlib")[:2000]
    return loaded[1](text, add_special_tokens=False, verbose=False)["input_ids"][:300]
