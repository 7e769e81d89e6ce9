"""What a run computed is compared here with what its file says, closer than fast kernels compute."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUNDWISE_KERNEL", "reference")
