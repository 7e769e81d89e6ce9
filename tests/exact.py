"""Fixture `exact`: the reference kernel, for tests that compare a run with its files.

They compare more closely than fast kernels compute. The conftest.py of a folder imports it to use it.
"""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUNDWISE_KERNEL", "reference")
