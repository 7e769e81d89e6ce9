"""`roundwise report` as a command."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import Commands


def test_the_page_is_written_and_named(
    commands: Commands, text_model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = commands.run(
        "quantize", text_model, out, "--group-size", 32, "--recipe", "textbook", "--calibration", text,
        "--samples", 4, "--seq-len", 32, "--json",
    )  # fmt: skip
    assert made.code == 0, made.stderr
    page = out / "roundwise-report.html"
    page.unlink()
    ended = commands.run("report", out, "--json")
    assert ended.code == 0, ended.stderr
    assert Path(ended.json["report"]) == page
    assert "model.layers.0" in page.read_text()


def test_a_checkpoint_that_is_not_ours_is_refused(commands: Commands, text_model: Path) -> None:
    ended = commands.run("report", text_model)
    assert ended.code == 2
    assert "roundwise.json" in ended.sentence
