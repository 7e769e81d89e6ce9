"""`roundwise quantize`: its output in words and as JSON, its options, and --from-manifest."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.outputs import only_json
from tests.helpers import Commands, Ended, contents, edited_json, random_model
from tests.mixtures import MIXTURES

QUANTIZE_KEYS = {
    "output", "seconds", "peak_rss_bytes", "bits_per_weight", "bytes_before", "bytes_after", "mode",
    "layers",
}  # fmt: skip
LAYER_KEYS = {
    "name", "bits", "group_size", "relative_error", "damp_percent", "tokens", "fallback"
}  # fmt: skip

#: What a run says that it is doing, in order.
WORK = [
    "opening the model",
    "reading the calibration text",
    "planning memory",
    "measuring what errors of outputs cost",
    "quantizing blocks",
    "completing the checkpoint",
    "checking files",
    "checking layers",
]


class TestQuantize:
    def test_json(self, made: tuple[Path, Ended]) -> None:
        out, ended = made
        result = only_json(ended)
        assert result.keys() >= QUANTIZE_KEYS
        assert result["output"] == str(out)
        assert result["mode"] in ("true_sequential", "block")
        assert len(result["layers"]) == 3 * 7
        for layer in result["layers"]:
            assert layer.keys() >= LAYER_KEYS
            assert 0 < layer["relative_error"] < 0.1
            assert (layer["bits"], layer["group_size"], layer["tokens"]) == (4, 32, 128)
            assert layer["fallback"] is None

    def test_progress_goes_to_stderr_in_plain_lines(self, made: tuple[Path, Ended]) -> None:
        lines = made[1].stderr.splitlines()
        blocks = [line for line in lines if line.startswith("block ")]
        assert len(blocks) == 4
        assert blocks[0].split("  ")[0] == "block"
        for number, line in enumerate(blocks[1:], start=1):
            assert re.fullmatch(
                rf"block {number}/3 +7  \d\.\de-\d\d +\d\.\de-\d\d \w+ +0:\d\d", line
            )
        assert [line for line in lines if line not in blocks] == WORK
        assert "\x1b" not in made[1].stderr

    def test_words(self, commands: Commands, text_model: Path, text: Path, tmp_path: Path) -> None:
        ended = commands.run(
            "quantize", text_model, tmp_path / "out", "--calibration", text, "--group-size", 32,
            "--samples", 2, "--seq-len", 32,
        )  # fmt: skip
        assert ended.code == 0
        assert re.search(r"^layers +21, \d\.\d\d bits per weight$", ended.stdout, re.MULTILINE)
        assert max(map(len, ended.stdout.splitlines()[:5])) < 80
        assert "note: 2 calibration samples: 128 or more are advised" in ended.stdout
        assert f"verified, saved in {tmp_path / 'out'}" in ended.stdout

    def test_every_option(
        self, commands: Commands, text_model: Path, text: Path, tmp_path: Path
    ) -> None:
        result = only_json(
            commands.run(
                "quantize", text_model, tmp_path / "out", "--bits", 3, "--group-size", 32, "--asym",
                "--desc-act", "--damp-percent", 0.02, "--calibration", text, "--samples", 3,
                "--seq-len", 16, "--batch-size", 2, "--seed", 7, "--format", "gptq_v2",
                "--override", "down_proj=bits:8,group_size:96", "--skip", r"layers\.0\.self_attn",
                "--mode", "block", "--max-memory", "1GB", "--strict", "--json",
            )
        )  # fmt: skip
        with edited_json(tmp_path / "out" / "config.json") as config:
            found = config["quantization_config"]
        assert found["bits"] == 3
        assert found["sym"] is False
        assert found["desc_act"] is True
        assert found["damp_percent"] == 0.02
        assert found["checkpoint_format"] == "gptq_v2"
        assert found["true_sequential"] is False
        assert len(result["layers"]) == 3 * 7 - 4
        kinds = {
            x["name"].rpartition(".")[2]: (x["bits"], x["group_size"]) for x in result["layers"]
        }
        assert kinds["down_proj"] == (8, 96)
        assert kinds["up_proj"] == (3, 32)
        assert {layer["tokens"] for layer in result["layers"]} == {48}

    def test_rtn_needs_no_text(self, commands: Commands, text_model: Path, tmp_path: Path) -> None:
        result = only_json(
            commands.run(
                "quantize", text_model, tmp_path / "out", "--method", "rtn", "--group-size", 32,
                "--json",
            )
        )  # fmt: skip
        assert {layer["relative_error"] for layer in result["layers"]} == {None}
        assert len(result["layers"]) == 21


@pytest.mark.slow
def test_a_fresh_process_writes_the_same_bytes(
    made: tuple[Path, Ended], text_model: Path, text: Path, tmp_path: Path
) -> None:
    """`python -m roundwise`, really started: the other tests fork what is imported already."""
    ended = subprocess.run(
        [
            sys.executable, "-m", "roundwise", "quantize", text_model, tmp_path / "out",
            "--calibration", text, "--group-size", "32", "--samples", "4", "--seq-len", "32", "--json",
        ],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["output"] == str(tmp_path / "out")
    assert [x for x in ended.stderr.splitlines() if not x.startswith("block ")] == WORK
    assert contents(tmp_path / "out") == contents(made[0])


class TestFromManifest:
    def test_the_same_bytes(
        self, commands: Commands, made: tuple[Path, Ended], tmp_path: Path
    ) -> None:
        command = ("quantize", "--from-manifest", made[0], "--output", tmp_path / "again")
        ended = commands.run(*command)
        assert ended.code == 0
        assert "model.safetensors: equal" in ended.stdout
        assert ended.stdout.splitlines()[-1] == f"the same bytes as {made[0]}"
        again = only_json(commands.run(*command, "--json"))
        assert again["same"] is True
        assert set(again["files"].values()) == {True}
        assert contents(made[0]) == contents(tmp_path / "again")

    def test_other_bytes_are_exit_code_1(
        self, commands: Commands, made: tuple[Path, Ended], tmp_path: Path
    ) -> None:
        shutil.copy(made[0] / "roundwise.json", tmp_path)
        with edited_json(tmp_path / "roundwise.json") as record:
            record["files"]["model.safetensors"] = "0" * 64
        ended = commands.run(
            "quantize", "--from-manifest", tmp_path / "roundwise.json", "--output", tmp_path / "new"
        )
        assert ended.code == 1
        assert "model.safetensors: different" in ended.stdout
        assert "config.json: equal" in ended.stdout
        assert "not the same bytes" in ended.stdout

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--output", "new", "--bits", 4, "--asym"], "--bits, --sym: the settings are those"),
            ([], "which folder for the result?"),
        ],
    )
    def test_usage(
        self, options: list[object], says: str, commands: Commands, made: tuple[Path, Ended]
    ) -> None:
        ended = commands.run("quantize", "--from-manifest", made[0], *options)
        assert ended.code == 2
        assert says in ended.sentence

    def test_no_model(self, commands: Commands) -> None:
        ended = commands.run("quantize", "--output", "new")
        assert ended.code == 2
        assert "which model?" in ended.sentence


def test_tokens_of_experts_are_shown(
    commands: Commands, tiny: Path, text: Path, tmp_path: Path
) -> None:
    config = MIXTURES["mixtral"].config()
    config.vocab_size = 4096
    random_model(config).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, tmp_path / "model")
    options = ["--calibration", text, "--samples", 4, "--seq-len", 64, "--group-size", 32]
    shown = commands.run(
        "quantize", tmp_path / "model", tmp_path / "out", *options, "--expert-tokens", 10_000
    )
    assert shown.code == 0, shown.stderr
    assert "8 experts in 2 layers: " in shown.stdout
    assert "few of 256 calibration tokens were routed to this expert" in " ".join(
        shown.stdout.split()
    )
    assert "was rounded to nearest" not in shown.stdout
    every = commands.run(
        "quantize", tmp_path / "model", tmp_path / "all", *options, "--experts", "all", "--json"
    )
    assert every.code == 0, every.stderr
    assert {layer["tokens"] for layer in every.json["layers"]} == {4 * 64}
    assert len(every.json["experts"]) == 2
