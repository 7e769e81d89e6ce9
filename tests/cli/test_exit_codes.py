"""0: done; 1: a check or run failed; 2: bad usage or input, nothing was started. The docs say so too."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import Commands, Ended

TRUST = Path(__file__).parents[2] / "docs" / "trust.md"


@pytest.fixture
def quantize(
    commands: Commands, text_model: Path, text: Path, tmp_path: Path
) -> Callable[..., Ended]:
    def run(*options: object, model: Path = text_model, out: str = "out") -> Ended:
        return commands.run(
            "quantize", model, tmp_path / out, "--calibration", text, "--group-size", 32,
            "--samples", 2, "--seq-len", 32, "--recipe", "textbook", *options,
        )  # fmt: skip

    return run


@pytest.fixture
def silent(text_model: Path, tmp_path: Path) -> Path:
    """A model whose second MLP reads nothing but zeros: its layers fall back."""
    folder = Path(shutil.copytree(text_model, tmp_path / "silent"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"] = torch.zeros(64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_docs_name_all_three() -> None:
    page = TRUST.read_text(encoding="utf-8")
    assert all(f"| {code} |" in page for code in (0, 1, 2))


class TestDone:
    def test_as_asked(self, quantize: Callable[..., Ended], commands: Commands) -> None:
        ended = quantize()
        assert ended.code == 0
        assert "not as asked" not in ended.stdout + ended.stderr
        assert ended.stdout.splitlines()[-1].startswith("verified, saved in ")
        assert quantize().code == 0  # finished already

    def test_not_as_asked_is_said_in_the_last_lines(
        self, quantize: Callable[..., Ended], silent: Path
    ) -> None:
        ended = quantize("--skip", "no_such_layer", model=silent)
        assert ended.code == 0
        last = ended.stdout.splitlines()[-4:]
        assert all(line.startswith("not as asked: ") for line in last)
        assert "'no_such_layer' (--override, --skip) decides about no layer" in last[0]
        assert "model.layers.1.mlp.down_proj: rounded to nearest: the Hessian is zero" in last[-1]
        again = quantize("--skip", "no_such_layer", "--json", model=silent)
        assert again.json["not_as_asked"] == [line.removeprefix("not as asked: ") for line in last]

    @pytest.mark.parametrize("command", ["plan", "inspect", "doctor", "--help", "--version"])
    def test_others(self, command: str, commands: Commands, text_model: Path) -> None:
        model = [text_model] if command in ("plan", "inspect") else []
        options = ["--group-size", 32] if command == "plan" else []
        assert commands.run(command, *model, *options).code == 0


class TestFailed:
    def test_a_strict_run_whose_layer_falls_back(
        self, quantize: Callable[..., Ended], silent: Path, tmp_path: Path
    ) -> None:
        ended = quantize("--strict", model=silent)
        assert ended.code == 1
        assert "model.layers.1.mlp.gate_proj: rounded to nearest" in ended.sentence
        assert not (tmp_path / "out" / "config.json").exists()

    def test_a_run_that_is_stopped(
        self, commands: Commands, tiny: Path, text: Path, tmp_path: Path
    ) -> None:
        running = commands.start("quantize", tiny, tmp_path / "out", "--calibration", text)
        running.reach((tmp_path / "out" / ".roundwise" / "journal.jsonl").exists)
        assert running.stop(signal.SIGINT).code == 1

    def test_a_check_that_fails(
        self, quantize: Callable[..., Ended], commands: Commands, tmp_path: Path
    ) -> None:
        assert quantize().code == 0
        assert commands.run("verify", tmp_path / "out").code == 0
        (tmp_path / "out" / "tokenizer.json").unlink()
        assert commands.run("verify", tmp_path / "out").code == 1

    def test_a_limit_that_is_not_kept(
        self, quantize: Callable[..., Ended], commands: Commands, text_model: Path, text: Path,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        assert quantize("--bits", 2).code == 0
        options = ["--text", text, "--max-tokens", 200, "--window", 64, "--no-speed", "--max-kl"]
        command = ["compare", text_model, tmp_path / "out", *options]
        assert commands.run(*command, 0).code == 1
        assert commands.run(*command, 100).code == 0

    def test_a_plan_that_would_be_refused(self, commands: Commands, text_model: Path) -> None:
        assert commands.run("plan", text_model, "--group-size", 64).code == 1


class TestBadInput:
    @pytest.mark.parametrize(
        "options",
        [
            ["--bits", 9], ["--nonsense"], ["--calibration", "nothing.txt"], ["--max-memory", "much"],
            ["--strict", "--skip", "no_such_layer"], ["--strict", "--max-memory", "1kB"],
            ["--strict", "--samples", 100_000],
        ],
        ids=lambda options: " ".join(map(str, options)),
    )  # fmt: skip
    def test_nothing_is_started(
        self, options: list[object], quantize: Callable[..., Ended], tmp_path: Path
    ) -> None:
        assert quantize(*options).code == 2
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "command", ["plan", "quantize", "inspect", "verify", "eval", "generate", "bench", "convert"]
    )
    def test_a_model_that_is_not_there(self, command: str, commands: Commands, text: Path) -> None:
        more = {
            "quantize": ["out"], "eval": ["--text", text], "generate": ["x"],
            "convert": ["out", "--to", "dense"],
        }  # fmt: skip
        assert commands.run(command, "nowhere", *more.get(command, [])).code == 2

    def test_a_folder_that_holds_something_else(
        self, quantize: Callable[..., Ended], tmp_path: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").touch()
        assert quantize().code == 2
