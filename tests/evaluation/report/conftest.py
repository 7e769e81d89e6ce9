"""A finished run of the bundled model, for tests of its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from roundwise.system.hub import bundled_model
from tests.helpers import Commands


@pytest.fixture(scope="package")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, commands: Commands
) -> tuple[Path, dict[str, Any]]:
    """A 3 bit checkpoint of the bundled model and what `quantize` printed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    done = commands.run(
        "quantize", bundled_model(), out, "--bits", 3, "--calibration", "python-stdlib",
        "--samples", 16, "--seq-len", 64, "--batch-size", 2, "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    return out, done.json
