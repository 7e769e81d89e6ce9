"""`roundwise plan`: the table and the lines below it, and the options that it shares with quantize."""

from __future__ import annotations

from pathlib import Path

from roundwise.cli.commands.plan import _format_duration, _group_alike
from roundwise.plan.plan import PlannedLayer
from tests.helpers import Commands


def test_the_table(commands: Commands, text_model: Path) -> None:
    ended = commands.run("plan", text_model, "--group-size", 32, "--skip", "down_proj")
    assert ended.code == 0, ended.stderr
    rows = [line.split() for line in ended.stdout.splitlines() if "model.layers.*" in line]
    table = {row[0]: row[1:] for row in rows}
    assert len(table) == 7
    assert table["model.layers.*.self_attn.q_proj"] == ["3x", "64", "x", "64", "4", "32"]
    assert table["model.layers.*.self_attn.k_proj"] == ["3x", "32", "x", "64", "4", "32", "q_proj"]
    assert table["model.layers.*.mlp.down_proj"] == ["3x", "64", "x", "96", "-"]


def test_the_lines_below(commands: Commands, text_model: Path) -> None:
    lines = {
        line[:28].strip(): line[29:]
        for line in commands.run("plan", text_model, "--group-size", 32).stdout.splitlines()
    }
    assert lines["vLLM, CPU"] == "serves it"
    assert lines["tensor parallel"] == "cannot be split over GPUs"  # groups of 32 in 96 columns
    assert lines["quantized"].endswith("% of all parameters")
    assert lines["time"].endswith("(estimated from a short trial on this machine)")


def test_options_of_quantize(commands: Commands, text_model: Path) -> None:
    """A rotated head is untied; what a run holds depends on the recipe."""
    options = ("plan", text_model, "--group-size", 32, "--samples", 8, "--json")
    usual = commands.run(*options).json
    rotated = commands.run(*options, "--rotate", "--rotation-seed", 3).json
    assert rotated["bytes_after"] == usual["bytes_after"]
    assert rotated["tied_embeddings"] is False
    simple = commands.run(*options, "--alpha", 0, "--beta", 0, "--output-tokens", 0).json
    # Seconds are measured on a machine that does other things too; phases are not.
    assert usual["phases"].keys() - simple["phases"].keys() == {"drift", "gradients"}
    assert commands.run(*options, "--rotation-seed", -1).code == 2


def test_modules_that_differ_in_their_block_are_one_row() -> None:
    layers = [
        PlannedLayer(f"model.layers.{block}.mlp.up_proj", (8, 4), bits, 4, None, None)
        for block, bits in enumerate([4, 4, 8])
    ]
    assert _group_alike(layers) == [
        ("model.layers.*.mlp.up_proj", layers[0], 2), ("model.layers.*.mlp.up_proj", layers[2], 1)
    ]  # fmt: skip


def test_durations() -> None:
    assert [_format_duration(seconds) for seconds in (3.2, 600, 7200)] == ["3 s", "10 min", "2.0 h"]
