"""Fixtures of the command tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import Commands, Ended


@pytest.fixture(scope="session")
def made(
    commands: Commands, text_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Ended]:
    """A checkpoint made by `roundwise quantize`, and what the command printed. Not to be changed."""
    out = tmp_path_factory.mktemp("made") / "out"
    ended = commands.run(
        "quantize", text_model, out, "--calibration", text, "--group-size", 32, "--samples", 4,
        "--seq-len", 32, "--json",
    )  # fmt: skip
    return out, ended
