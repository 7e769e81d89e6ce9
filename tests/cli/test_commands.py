"""Every command: what it prints, in words and as one JSON object, and its exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import transformers

import roundwise as rw
from roundwise.calibration import sources
from roundwise.cli import main
from roundwise.cli.commands import generate
from roundwise.inference.prompts import encode_chat
from roundwise.verify import audit
from tests.helpers import CHAT_TEMPLATE, Commands, Ended, contents, edited_json, random_model
from tests.mixtures import MIXTURES

QUANTIZE_KEYS = {
    "output", "seconds", "peak_rss_bytes", "bits_per_weight", "bytes_before", "bytes_after", "mode",
    "layers",
}  # fmt: skip
LAYER_KEYS = {
    "name", "bits", "group_size", "relative_error", "damp_percent", "tokens", "fallback"
}  # fmt: skip


def only_json(ended: Ended) -> Any:
    """The one object on stdout, of a command that succeeded."""
    assert ended.code == 0, ended.stderr
    value, end = json.JSONDecoder().raw_decode(ended.stdout)
    assert not ended.stdout[end:].strip()
    return value


@pytest.fixture(scope="module")
def made(
    commands: Commands, text_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Ended]:
    """A checkpoint made by the command, and what the command said."""
    out = tmp_path_factory.mktemp("made") / "out"
    ended = commands.run(
        "quantize", text_model, out, "--calibration", text, "--group-size", 32, "--samples", 4,
        "--seq-len", 32, "--json",
    )  # fmt: skip
    return out, ended


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
        assert len(blocks) == 3
        for number, line in enumerate(blocks, start=1):
            assert line.startswith(f"block {number}/3  q_proj ")
            assert re.search(r"down_proj \d\.\d\de-\d\d  \d+ s left$", line)
        assert "\x1b" not in made[1].stderr

    def test_words(self, commands: Commands, text_model: Path, text: Path, tmp_path: Path) -> None:
        ended = commands.run(
            "quantize", text_model, tmp_path / "out", "--calibration", text, "--group-size", 32,
            "--samples", 2, "--seq-len", 32,
        )  # fmt: skip
        assert ended.code == 0
        assert "21 layers in" in ended.stdout
        assert "bits per weight" in ended.stdout.replace("\n", " ")
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


class TestInspect:
    def test_json(self, commands: Commands, made: tuple[Path, Ended]) -> None:
        found = only_json(commands.run("inspect", made[0], "--json"))
        assert found["architecture"] == "LlamaForCausalLM"
        assert found["quantization"]["bits"] == 4
        layers = {layer["name"]: layer for layer in found["layers"]}
        assert len(layers) == 21
        down = layers["model.layers.0.mlp.down_proj"]
        assert (down["in_features"], down["out_features"]) == (96, 64)
        assert (down["bits"], down["group_size"], down["act_order"]) == (4, 32, False)
        assert down["bits_per_weight"] == pytest.approx(4 + 20 / 32 + 32 / 64)
        # Two embeddings, two norms per block, one at the end.
        assert found["other_tensors"] == 2 + 6 + 1

    def test_act_order_shows(self, commands: Commands, quantized: Callable[..., Path]) -> None:
        found = only_json(commands.run("inspect", quantized("llama", desc_act=True), "--json"))
        assert any(layer["act_order"] for layer in found["layers"])

    def test_a_model_that_is_not_quantized(self, commands: Commands, text_model: Path) -> None:
        found = only_json(commands.run("inspect", text_model, "--json"))
        assert found["quantization"] is None
        assert found["layers"] == []
        assert "quantized: no" in commands.run("inspect", text_model).stdout

    def test_words(self, commands: Commands, made: tuple[Path, Ended]) -> None:
        ended = commands.run("inspect", made[0])
        assert ended.code == 0
        assert "LlamaForCausalLM" in ended.stdout
        assert "group_size: 32" in ended.stdout


class TestVerify:
    def test_a_fresh_checkpoint(
        self, commands: Commands, made: tuple[Path, Ended], text_model: Path
    ) -> None:
        found = only_json(commands.run("verify", made[0], "--against", text_model, "--json"))
        assert found["ok"] is True
        assert found["failures"] == []
        assert found["checked"]["layers"] == found["checked"]["weight errors"] == 21
        assert found["checked"]["tensors carried over"] == 9

    def test_a_damaged_one_fails(
        self, commands: Commands, made: tuple[Path, Ended], copied: Path
    ) -> None:
        shard = sorted(copied.glob("*.safetensors"))[0]
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        ended = commands.run("verify", copied, "--json")
        assert ended.code == 1
        assert ended.json["ok"] is False
        assert shard.name in ended.json["failures"][0]
        words = commands.run("verify", copied)
        assert words.code == 1
        assert f"failed: {shard.name} was changed" in words.stderr
        assert "Traceback" not in words.stderr

    @pytest.fixture
    def copied(self, made: tuple[Path, Ended], tmp_path: Path) -> Path:
        return Path(shutil.copytree(made[0], tmp_path / "copy"))

    def test_a_model_that_is_not_quantized_fails(
        self, commands: Commands, text_model: Path
    ) -> None:
        ended = commands.run("verify", text_model, "--json")
        assert ended.code == 1
        assert "is not quantized" in ended.json["failures"][0]


class TestEval:
    def test_json_is_what_python_computes(
        self, commands: Commands, made: tuple[Path, Ended], text: Path
    ) -> None:
        ended = commands.run(
            "eval", made[0], "--text", text, "--window", 64, "--stride", 32, "--max-tokens", 300,
            "--json",
        )  # fmt: skip
        found = only_json(ended)
        model, tokenizer = rw.load(made[0])
        expected = rw.perplexity(
            model, tokenizer, text.read_text(), window=64, stride=32, max_tokens=300
        )
        assert found == {
            "perplexity": pytest.approx(expected.perplexity, rel=1e-6),
            "tokens": 299, "window": 64, "stride": 32,
        }  # fmt: skip

    def test_words(self, commands: Commands, text_model: Path, text: Path) -> None:
        ended = commands.run("eval", text_model, "--text", text, "--max-tokens", 100)
        assert ended.code == 0
        assert re.match(
            r"perplexity \d+\.\d{4}  \(99 tokens, window 100, stride 100\)$", ended.stdout
        )  # fmt: skip


class TestGenerate:
    def test_json(self, commands: Commands, tiny: Path) -> None:
        command = ("generate", tiny, "def read_file(path):", "--max-new-tokens", 12, "--json")
        found = only_json(commands.run(*command))
        assert found.keys() == {
            "prompt", "text", "tokens", "prompt_tokens", "finish_reason", "seconds",
            "prompt_tokens_per_second", "generation_tokens_per_second",
        }  # fmt: skip
        assert found["prompt_tokens_per_second"] > 0
        assert found["generation_tokens_per_second"] > 0
        assert found["prompt"] == "def read_file(path):"
        assert 0 < found["tokens"] <= 12
        assert only_json(commands.run(*command))["text"] == found["text"]

    def test_words_are_the_text(self, commands: Commands, made: tuple[Path, Ended]) -> None:
        ended = commands.run(
            "generate", made[0], "import os", "--max-new-tokens", 5, "--temperature", 0.8
        )  # fmt: skip
        assert ended.code == 0
        assert "import os" in ended.stdout
        assert "Traceback" not in ended.stderr

    def test_a_chat(self, commands: Commands, tiny: Path, tmp_path: Path) -> None:
        template = tmp_path / "chat.jinja"
        template.write_text(CHAT_TEMPLATE)
        words = commands.run(
            "generate", tiny, "open a file", "--chat", "--chat-template", template,
            "--max-new-tokens", 5,
        )  # fmt: skip
        assert words.code == 0
        assert "open a file" not in words.stdout  # only the answer
        assert re.match(r"5 tokens in \d+\.\d\d s, \d+\.\d tokens/s after the first$", words.stderr)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["hi", "--chat"], "has no chat template: use plain completions"),
            (["hi", "--system", "be brief"], "are for a chat: add --chat"),
            ([" "], "the prompt is empty"),
            ([], "the prompt is empty"),  # nothing on standard input either
            (["hi", "--max-new-tokens", 0], "--max-new-tokens 0: must be at least 1"),
            (["hi", "--device", "tpu"], "device 'tpu' is not known"),
        ],
    )
    def test_bad_usage(
        self, options: list[object], message: str, commands: Commands, tiny: Path
    ) -> None:
        ended = commands.run("generate", tiny, *options)
        assert ended.code == 2
        assert message in ended.sentence

    def test_a_conversation_on_a_terminal(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        template = tmp_path / "chat.jinja"
        template.write_text(CHAT_TEMPLATE)
        said = iter(["open a file", "and close it"])
        seen: list[Any] = []

        def say(_: str) -> str:
            return next(said, "")

        def encode(tokenizer: Any, messages: list[Any]) -> list[int]:
            seen.append([message["role"] for message in messages])
            return encode_chat(tokenizer, messages)

        monkeypatch.setattr("builtins.input", say)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("roundwise.inference.prompts.encode_chat", encode)
        generate.command(
            str(tiny), chat=True, system="be brief", chat_template=template, max_new_tokens=4
        )
        assert capsys.readouterr().out.count("\n") >= 2
        turn = ["system", "user"]
        assert seen == [turn, turn, [*turn, "assistant", "user"]]


class TestBench:
    def test_json(self, commands: Commands, made: tuple[Path, Ended]) -> None:
        found = only_json(
            commands.run(
                "bench", made[0], "--prompt-tokens", 8, "--generated-tokens", 4, "--repetitions", 2,
                "--batch-size", 2, "--dtype", "float32", "--threads", 1, "--json",
            )
        )  # fmt: skip
        assert found.keys() >= {
            "prompt_tokens_per_second", "generation_tokens_per_second", "latency_ms",
            "peak_rss_bytes", "kernels", "load_seconds", "threads", "dtype", "device",
        }  # fmt: skip
        assert found["latency_ms"].keys() == {"first_token", "mean", "p50", "p90", "p99"}
        assert found["dtype"] == "float32"
        assert sum(found["kernels"].values()) == 22

    def test_words_and_a_kernel_by_name(self, commands: Commands, made: tuple[Path, Ended]) -> None:
        ended = commands.run(
            "bench", made[0], "--prompt-tokens", 4, "--generated-tokens", 3, "--repetitions", 1,
            "--kernel", "reference",
        )  # fmt: skip
        assert ended.code == 0
        assert re.search(r"^kernels +reference 21, torch 1$", ended.stdout, re.MULTILINE)
        assert re.search(r"^generation +\d+\.\d tokens/s  \(1 x 3\)$", ended.stdout, re.MULTILINE)

    def test_a_kernel_that_is_not_there(self, commands: Commands, made: tuple[Path, Ended]) -> None:
        ended = commands.run("bench", made[0], "--kernel", "magic")
        assert ended.code == 2
        assert "no kernel is called 'magic'" in ended.sentence


class TestDemo:
    """In this process, with one block and few tokens: the whole of it takes a minute."""

    @pytest.fixture
    def first_block(self, tiny: Path, tmp_path: Path) -> Path:
        """The bundled model without all blocks but the first."""
        folder = Path(shutil.copytree(tiny, tmp_path / "first-block"))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, num_hidden_layers=1, dtype="auto"
        )
        model.save_pretrained(folder)
        return folder

    @pytest.fixture
    def demo(
        self,
        first_block: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> Iterator[Callable[..., str]]:
        monkeypatch.setattr("roundwise.checkpoint.hub.bundled_model", lambda: first_block)
        monkeypatch.setattr("roundwise.cli.commands.demo.TOKENS", 400)
        some = {kept: list(islice(sources._stdlib(held_out=kept), 4)) for kept in (True, False)}
        monkeypatch.setattr(sources, "_stdlib", lambda *, held_out: some[held_out])
        handler = signal.getsignal(signal.SIGTERM)

        def run(*arguments: object) -> str:
            monkeypatch.setattr(sys, "argv", ["roundwise", "demo", *map(str, arguments)])
            with pytest.raises(SystemExit) as end:
                main()
            assert end.value.code == 0
            return capsys.readouterr().out

        yield run
        signal.signal(signal.SIGTERM, handler)

    def test_json_then_words(self, demo: Callable[..., str], tmp_path: Path) -> None:
        found = json.loads(demo(tmp_path / "demo", "--samples", 2, "--json"))
        rows = {row["name"]: row for row in found["results"]}
        assert list(rows) == ["original", "RTN 4 bit", "GPTQ 4 bit", "RTN 3 bit", "GPTQ 3 bit"]
        assert all(row["perplexity"] > 1 for row in rows.values())
        assert rows["GPTQ 4 bit"]["bytes"] < rows["original"]["bytes"]
        assert rows["GPTQ 3 bit"]["bits_per_weight"] < rows["GPTQ 4 bit"]["bits_per_weight"]
        checkpoint = Path(found["checkpoint"])
        assert (checkpoint / "config.json").exists()
        assert not audit(checkpoint).failures
        # Again, in the same folder: a table and how to go on.
        words = demo(tmp_path / "demo", "--samples", 1)
        assert "perplexity" in words
        assert "GPTQ 3 bit" in words
        assert f"checkpoint: {checkpoint}" in words
        assert f"roundwise generate {checkpoint}" in words


def test_version(commands: Commands) -> None:
    ended = commands.run("--version")
    assert (ended.code, ended.stdout) == (0, f"roundwise {rw.__version__}\n")


def test_help_lists_the_commands(commands: Commands) -> None:
    ended = commands.run("--help")
    assert ended.code == 0
    for name in ("quantize", "inspect", "verify", "eval", "generate", "bench", "serve", "demo"):
        assert name in ended.stdout
        assert commands.run(name, "--help").code == 0


class TestModule:
    """`python -m roundwise`, really started: the other tests fork what is imported already."""

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "roundwise", *map(str, arguments)],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def test_help_does_not_wait_for_torch(self) -> None:
        code = (
            "import sys, runpy; sys.argv = ['roundwise', '--help']\n"
            "try: runpy.run_module('roundwise', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    def test_quantize_writes_what_the_others_write(
        self, made: tuple[Path, Ended], text_model: Path, text: Path, tmp_path: Path
    ) -> None:
        ended = self.run(
            "quantize", text_model, tmp_path / "out", "--calibration", text, "--group-size", 32,
            "--samples", 4, "--seq-len", 32, "--json",
        )  # fmt: skip
        assert ended.returncode == 0
        assert json.loads(ended.stdout)["output"] == str(tmp_path / "out")
        assert not [x for x in ended.stderr.splitlines() if not x.startswith("block ")]
        assert contents(tmp_path / "out") == contents(made[0])

    def test_an_error_is_one_line(self, tmp_path: Path) -> None:
        ended = self.run("inspect", tmp_path)
        assert ended.returncode == 2
        assert ended.stderr.strip() == f"error: {tmp_path} has no config.json, so it is not a model"
        assert ended.stdout == ""


class TestFromManifest:
    def test_the_same_bytes(
        self, commands: Commands, made: tuple[Path, Ended], tmp_path: Path
    ) -> None:
        command = ("quantize", "--from-manifest", made[0], "--output", tmp_path / "again")
        ended = commands.run(*command)
        assert ended.code == 0
        assert "model-00001-of-00004.safetensors: equal" in ended.stdout
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
            record["files"]["model-00002-of-00004.safetensors"] = "0" * 64
        ended = commands.run(
            "quantize", "--from-manifest", tmp_path / "roundwise.json", "--output", tmp_path / "new"
        )
        assert ended.code == 1
        assert "model-00002-of-00004.safetensors: different" in ended.stdout
        assert "model-00001-of-00004.safetensors: equal" in ended.stdout
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
