"""Recipe files: options of quantize in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from roundwise.checkpoint.manifest import read_manifest
from roundwise.cli.recipe import read_recipe, recipe_text
from roundwise.config import CalibrationConfig, QuantizeConfig, RunConfig
from roundwise.errors import ConfigError
from tests.helpers import Commands, contents

KNOWN = {"group_size": False, "bits": False, "skip": True, "target_widths": False}


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return read_recipe(file, KNOWN)


def test_options_by_either_spelling(tmp_path: Path) -> None:
    text = "group-size: 64\nskip: [a, b]\ntarget_widths: [3, 4]\nbits:\n"
    assert read(tmp_path, text) == {"group_size": 64, "skip": ["a", "b"], "target_widths": "3,4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group-sizes: 64", "there is no option group-sizes; did you mean group-size\\?"),
        ("[1, 2]", "must be a list of options such as `group-size: 64`"),
        ("a: [", "is not YAML: "),
        ("!!python/object/apply:os.getcwd []", "is not YAML: "),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_a_group_size_that_the_model_decides_is_left_open() -> None:
    settings = [CalibrationConfig(), QuantizeConfig(), RunConfig()]
    assert "group-size" not in recipe_text(None, settings)
    assert "group-size: 128" in recipe_text(None, [QuantizeConfig(group_size=128)])


def test_a_printed_recipe_gives_the_same_run(
    commands: Commands, text_model: Path, text: Path, tmp_path: Path
) -> None:
    options = [
        "--calibration", text, "--group-size", 32, "--recipe", "textbook", "--samples", 4,
        "--seq-len", 32, "--asym", "--skip", "o_proj", "--override", "down_proj=bits:8",
        "--max-memory", "8GB", "--target-widths", "3,4",
    ]  # fmt: skip
    printed = commands.run("quantize", *options, "--print-config")
    assert printed.code == 0, printed.stderr
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(printed.stdout)
    done = [
        commands.run("quantize", text_model, tmp_path / "one", *options),
        commands.run("quantize", text_model, tmp_path / "two", "--config", recipe),
        commands.run("quantize", text_model, tmp_path / "three", "--config", recipe, "--bits", 8),
    ]
    assert [each.code for each in done] == [0, 0, 0], done[1].stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    manifests = [read_manifest(tmp_path / name) for name in ("two", "three")]
    assert [m.run.config["bits"] for m in manifests if m] == [4, 8]  # the command line comes first


def test_a_wrong_value_is_refused_like_an_option(
    commands: Commands, text_model: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bits: 9\n")
    ended = commands.run("quantize", text_model, tmp_path / "out", "--config", recipe)
    assert ended.code == 2 and "bits=9 is not supported" in ended.stderr
