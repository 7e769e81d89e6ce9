"""--quiet, --verbose and --log-file, which every command has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import Commands


@pytest.fixture
def line(text_model: Path, text: Path, tmp_path: Path) -> list[Any]:
    """A quantize command with a note about the small number of samples."""
    return [
        "quantize", text_model, tmp_path / "out", "--calibration", text, "--group-size", 32,
        "--recipe", "textbook", "--samples", 4, "--seq-len", 32,
    ]  # fmt: skip


def test_verbose_prints_each_layer(commands: Commands, line: list[Any]) -> None:
    ended = commands.run(*line, "-v")
    assert ended.code == 0, ended.stderr
    assert re.search(r"layers\.0\.self_attn\.q_proj: relative error [\d.e-]+\n", ended.stderr)
    assert ended.stderr.count("opening the model") == 1


def test_quiet_prints_results_and_errors_only(commands: Commands, line: list[Any]) -> None:
    loud = commands.run(*line)
    assert "block 1/" in loud.stderr
    ended = commands.run(*line, "--restart", "--quiet")
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.stdout
    failed = commands.run(*line, "-q", "--bits", 3)
    assert failed.code == 2
    assert len(failed.stderr.splitlines()) == 1 and failed.stderr.startswith("error: ")


def test_a_log_file(commands: Commands, line: list[Any], tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    ended = commands.run(*line, "--log-file", log)
    assert ended.code == 0, ended.stderr
    assert "relative error" not in ended.stderr
    lines = log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d [\d:,]+ (INFO|WARNING) \S+: ", each) for each in lines)
    assert any("INFO roundwise: opening the model" in each for each in lines)
    assert any(re.search(r"q_proj: relative error", each) for each in lines)
    assert any("WARNING roundwise: " in each for each in lines)


@pytest.mark.parametrize("command", ["eval", "verify", "serve", "plan", "demo"])
def test_every_command_has_them(commands: Commands, command: str) -> None:
    shown = commands.run(command, "--help").stdout
    for option in ("--quiet", "--verbose", "--log-file"):
        assert option in shown


def test_a_log_file_that_cannot_be_written(
    commands: Commands, line: list[Any], tmp_path: Path
) -> None:
    ended = commands.run(*line, "--log-file", tmp_path / "no" / "run.log")
    assert ended.code == 2 and "cannot be used: No such file" in ended.stderr
    assert not (tmp_path / "out").exists()
