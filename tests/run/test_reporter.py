"""The progress of a run: a bar that moves, and a line per block."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import roundwise as rw
from roundwise.run.reporter import Reporter, reporting
from roundwise.system.console import Steps
from tests.conftest import QUICK


def step(
    block: int,
    layer: Any = None,
    *,
    blocks: int = 4,
    resumed: int = 0,
    left: float | None = None,
) -> Any:
    """Returns a step of a run."""
    return SimpleNamespace(
        block=block, blocks=blocks, resumed=resumed, layer=layer, seconds_left=left
    )


def layer(name: str, error: float | None) -> Any:
    """Returns as much of a layer's record as is shown."""
    return SimpleNamespace(name=name, relative_error=error)


class TestReporter:
    def test_a_line_per_block(self, capsys: pytest.CaptureFixture[str]) -> None:
        report = Reporter(Steps(None, "quantizing"))
        report(step(0, layer("model.layers.0.q_proj", 0.00123)))
        report(step(0, layer("model.layers.0.k_proj", 0.00321)))
        report(step(0, layer("model.layers.0.v_proj", None)))
        report(step(0, left=75.0))
        report(step(1, left=None))
        assert capsys.readouterr().err.splitlines() == [
            "block         layers  mean error  largest error, layer         time left",
            "block 1/4          3  2.2e-03     3.2e-03 k_proj                    1:15",
            "block 2/4          0",
        ]

    def test_without_errors_there_is_no_header(self, capsys: pytest.CaptureFixture[str]) -> None:
        report = Reporter(Steps(None, "quantizing"))
        report(step(0, layer("model.layers.0.q_proj", None)))
        report(step(0))
        assert capsys.readouterr().err.splitlines() == ["block 1/4          1"]

    def test_a_line_fits_a_narrow_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        report = Reporter(Steps(None, "quantizing"))
        for expert in range(384):
            name = f"model.layers.1060.experts.{expert}.a_projection_with_a_long_name"
            report(step(1060, layer(name, 0.1), blocks=1280))
        report(step(1060, blocks=1280, left=360000.0))
        header, line = capsys.readouterr().err.splitlines()
        assert len(header) < 80
        assert len(line) < 80
        assert line.startswith("block 1061/1280    384  1.0e-01     1.0e-01 ")

    def test_blocks_of_an_earlier_run_do_not_count(self) -> None:
        moves = []

        class Recorded(Steps):
            def update(self, done: float, note: str = "") -> None:
                moves.append((done, note))

        report = Reporter(Recorded(None, "quantizing"))
        report(step(2, layer("model.q", 0.1), resumed=2))
        report(step(2, resumed=2))
        report(step(3, resumed=2))
        assert moves == [(0.0, "block 3/4 q"), (0.5, "block 3/4"), (1.0, "block 4/4")]


def test_true_shows_it(llama: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = QUICK.merged({"method": "rtn"})
    rw.quantize(llama, tmp_path / "shown", config, progress=True)
    assert "block 2/2" in capsys.readouterr().err
    rw.quantize(llama, tmp_path / "silent", config)
    assert capsys.readouterr().err == ""


def test_a_callback_is_used_as_it_is() -> None:
    def callback(_: object) -> None: ...

    with reporting(callback) as used:
        assert used is callback
    for nothing in (None, False):
        with reporting(nothing) as used:
            assert used is None
