"""The reference kernel for tests that hold what a run computed against what its file says.

They compare more closely than fast kernels compute. A folder's conftest.py imports `exact` to use it.
"""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUNDWISE_KERNEL", "reference")
