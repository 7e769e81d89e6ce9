"""Announcements reach listeners and the log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import roundwise as rw
from roundwise.system.activity import announce, listening
from tests.conftest import QUICK
from tests.helpers import windows


def test_listeners_hear_every_step_and_the_log_each_name(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[str, int, int]] = []
    with caplog.at_level(logging.INFO, "roundwise"), listening(lambda *step: heard.append(step)):
        announce("opening")
        announce("measuring", 0, 2)
        announce("measuring", 1, 2)
    announce("after")
    assert heard == [("opening", 0, 0), ("measuring", 0, 2), ("measuring", 1, 2)]
    assert caplog.messages == ["opening", "measuring"]


def test_a_library_prints_nothing_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    announce("something")
    logging.getLogger("roundwise").warning("a note")
    assert capsys.readouterr().err == ""


def test_a_run_says_what_it_does(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "roundwise"):
        made = rw.quantize(llama, tmp_path / "out", QUICK, windows(), samples=4, seq_len=32)
    said = caplog.messages
    names = ["opening the model", "reading the calibration text", "quantizing blocks"]
    assert [line for line in said if line in names] == names
    assert sum("q_proj: relative error" in line for line in said) == 2
    assert "block 2/2 finished, about 0 s left" in said
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warned == made.warnings
    assert warned
