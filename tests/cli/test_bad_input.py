"""Bad input is one clear sentence on stderr, the right exit code, and nothing that looks finished."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import Commands, Ended, contents, edited_json

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"


@pytest.fixture
def model(text_model: Path, tmp_path: Path) -> Path:
    """A model of its own for each test, to be damaged."""
    return Path(shutil.copytree(text_model, tmp_path / "model"))


@pytest.fixture
def quantize(commands: Commands, model: Path, text: Path, tmp_path: Path) -> Callable[..., Ended]:
    """Runs `roundwise quantize` on it; options given replace the usual ones."""

    def run(*options: object, out: Path | None = None, **limits: Any) -> Ended:
        usual = {"--calibration": text, "--group-size": 32, "--samples": 2, "--seq-len": 32}
        given = set(options)
        rest = [part for key, value in usual.items() if key not in given for part in (key, value)]
        return commands.run("quantize", model, out or tmp_path / "out", *rest, *options, **limits)

    return run


def refused(ended: Ended, *parts: str, code: int = 2) -> str:
    """Checks the exit code and that the one sentence names all `parts`; returns it."""
    sentence = ended.sentence
    assert ended.code == code, sentence
    assert not ended.stdout
    for part in parts:
        assert part in sentence
    return sentence


class TestModel:
    """What is wrong with the model's folder; nothing is written at all."""

    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, tmp_path: Path) -> Any:
        yield
        assert not (tmp_path / "out").exists()

    def test_no_such_folder(self, quantize: Callable[..., Ended], model: Path) -> None:
        shutil.rmtree(model)
        refused(quantize(), "there is no folder", str(model))

    def test_no_model(self, quantize: Callable[..., Ended], model: Path) -> None:
        (model / "config.json").unlink()
        refused(quantize(), "has no config.json, so it is not a model")

    def test_a_file_instead_of_a_folder(
        self, commands: Commands, text: Path, tmp_path: Path
    ) -> None:
        ended = commands.run("quantize", text, tmp_path / "out", "--calibration", text)
        refused(ended, "is not a folder with a model")

    def test_config_is_no_json(self, quantize: Callable[..., Ended], model: Path) -> None:
        (model / "config.json").write_text("{oops")
        refused(quantize(), "config.json cannot be read as JSON")

    def test_no_weights(self, quantize: Callable[..., Ended], model: Path) -> None:
        (model / SINGLE_FILE).unlink()
        refused(quantize(), "has no safetensors files")

    def test_only_pickled_weights(self, quantize: Callable[..., Ended], model: Path) -> None:
        (model / SINGLE_FILE).unlink()
        torch.save({"weight": torch.ones(2)}, model / "pytorch_model.bin")
        refused(quantize(), "only pickled weights", "pytorch_model.bin", "save_pretrained")

    @pytest.mark.parametrize(
        "data",
        [b"", b"\x00" * 4, b"\xff" * 64, (8).to_bytes(8, "little") + b"{not js}"],
        ids=["empty", "short", "huge header", "header is no JSON"],
    )
    def test_corrupt_header(self, data: bytes, quantize: Callable[..., Ended], model: Path) -> None:
        (model / SINGLE_FILE).write_bytes(data)
        refused(quantize(), SINGLE_FILE, "is damaged or not a safetensors file")

    @pytest.mark.parametrize("kept", [0.5, 0.999])
    def test_truncated_file(self, kept: float, quantize: Callable[..., Ended], model: Path) -> None:
        data = (model / SINGLE_FILE).read_bytes()
        (model / SINGLE_FILE).write_bytes(data[: int(kept * len(data))])
        refused(quantize(), SINGLE_FILE, "is damaged or not a safetensors file")

    def test_truncated_shard(self, quantize: Callable[..., Ended], model: Path) -> None:
        self.shard(model)
        last = sorted(model.glob("model-*.safetensors"))[-1]
        last.write_bytes(last.read_bytes()[:-100])
        refused(quantize(), last.name, "is damaged")

    def shard(self, model: Path) -> None:
        tensors = load_file(model / SINGLE_FILE)
        (model / SINGLE_FILE).unlink()
        half = len(tensors) // 2
        weight_map = {}
        for number, names in enumerate((list(tensors)[:half], list(tensors)[half:]), start=1):
            shard = f"model-0000{number}-of-00002.safetensors"
            save_file({name: tensors[name] for name in names}, model / shard)
            weight_map |= dict.fromkeys(names, shard)
        (model / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    def test_the_index_names_a_missing_file(
        self, quantize: Callable[..., Ended], model: Path
    ) -> None:
        self.shard(model)
        (model / "model-00002-of-00002.safetensors").unlink()
        refused(quantize(), "lacks model-00002-of-00002.safetensors, which its index names")

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", ""])
    def test_the_index_points_outside_the_folder(
        self, name: str, quantize: Callable[..., Ended], model: Path
    ) -> None:
        self.shard(model)
        with edited_json(model / INDEX_FILE) as index:
            index["weight_map"]["lm_head.weight"] = name
        refused(quantize(), f"names {name!r}, outside the folder")

    def test_the_index_has_no_map(self, quantize: Callable[..., Ended], model: Path) -> None:
        (model / INDEX_FILE).write_text('{"weight_map": ["model.safetensors"]}')
        refused(quantize(), "has no weight_map")

    def test_a_tensor_is_missing(self, quantize: Callable[..., Ended], model: Path) -> None:
        tensors = load_file(model / SINGLE_FILE)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, model / SINGLE_FILE)
        refused(quantize(), "lacks model.layers.1.mlp.up_proj.weight, which LlamaForCausalLM")

    def test_a_tensor_has_another_shape(self, quantize: Callable[..., Ended], model: Path) -> None:
        tensors = load_file(model / SINGLE_FILE)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 64)
        save_file(tensors, model / SINGLE_FILE)
        refused(
            quantize(), "model.layers.1.mlp.up_proj.weight has shape [64, 64]", "requires [96, 64]"
        )

    def test_unknown_architecture(self, quantize: Callable[..., Ended], model: Path) -> None:
        with edited_json(model / "config.json") as config:
            config["model_type"] = "from_the_future"
        refused(quantize(), "transformers", "cannot open", "from_the_future")

    def test_a_config_without_model_type(self, quantize: Callable[..., Ended], model: Path) -> None:
        (model / "config.json").write_text("{}")
        refused(quantize(), "cannot open", "no model_type")

    def test_no_causal_language_model(self, quantize: Callable[..., Ended], model: Path) -> None:
        (model / "config.json").write_text('{"model_type": "t5"}')
        refused(quantize(), "t5 is not a causal language model")

    def test_no_repeated_blocks(self, quantize: Callable[..., Ended], model: Path) -> None:
        with edited_json(model / "config.json") as config:
            config["num_hidden_layers"] = 0
        refused(quantize(), "LlamaForCausalLM has no repeated blocks with linear layers")

    def test_quantized_already(self, quantize: Callable[..., Ended], model: Path) -> None:
        with edited_json(model / "config.json") as config:
            config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        refused(quantize(), "is quantized already (bitsandbytes): start from the original")

    def test_code_that_comes_with_the_model_is_not_run(
        self, quantize: Callable[..., Ended], model: Path, tmp_path: Path
    ) -> None:
        with edited_json(model / "config.json") as config:
            config["model_type"] = "own"
            config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}
        (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        refused(quantize(), "cannot open")
        assert not (tmp_path / "ran").exists()


class TestSettings:
    """Settings that cannot be, or do not fit."""

    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, tmp_path: Path) -> Any:
        yield
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            (["--bits", 9], ["bits=9 is not supported: use 2, 3, 4, 5, 6, 7 or 8"]),
            (
                ["--group-size", 128],
                ["group_size=128 does not divide the input channels of", " layers (such as ",
                 "q_proj, 64 x 64): use --group-size "],
            ),
            (["--group-size", 12], ["group_size=12", "multiple of 8"]),
            (["--damp-percent", -1], ["damp_percent=-1"]),
            (
                ["--method", "magic"],
                ["method='magic' is not supported: use 'gptq' or 'rtn'"],
            ),
            (["--rotation-seed", -1], ["rotation_seed=-1"]),
            (["--format", "ggml"], ["format='ggml' is not supported"]),
            (["--order", "best"], ["order='best' is not supported"]),
            (["--mode", "fast"], ["mode='fast' is not supported"]),
            (["--max-memory", "much"], ["'much' is not a size"]),
            (["--override", "q_proj"], ["--override 'q_proj'", "REGEX=bits:8"]),
            (["--override", "(=bits:8"], ["'(' is not a regular expression"]),
            (["--override", "q_proj=bits:1"], ["bits=1 is not supported"]),
            (["--override", "q_proj=damp_percent:1"], ["an override may change bits"]),
            (["--skip", "."], ["every linear layer is skipped"]),
            (["--samples", 0], ["samples=0: must be at least 1"]),
            (["--samples", 10**9], ["samples=1000000000: must be", "at most 1000000"]),
            (["--batch-size", 10**9], ["batch_size=1000000000: must be"]),
        ],
    )  # fmt: skip
    def test_each_is_named(
        self, options: list[object], parts: list[str], quantize: Callable[..., Ended]
    ) -> None:
        refused(quantize(*options), *parts)

    def test_the_override_that_is_proposed_works(
        self, commands: Commands, quantize: Callable[..., Ended], model: Path, tmp_path: Path
    ) -> None:
        # 96 input channels: 64 divides the others.
        sentence = refused(quantize("--group-size", 64), "3 of 21 layers", "down_proj, 64 x 96")
        override = sentence.partition("--override '")[2].rstrip("'")
        out = tmp_path / "elsewhere"
        assert quantize("--group-size", 64, "--override", override, out=out).code == 0

    @pytest.mark.parametrize(
        "options", [["--bits", "four"], ["--nonsense"], ["--samples"]], ids=lambda o: o[0]
    )
    def test_usage_errors_exit_with_2(
        self, options: list[str], quantize: Callable[..., Ended]
    ) -> None:
        ended = quantize(*options)
        assert ended.code == 2
        assert options[0] in ended.stderr
        assert "Traceback" not in ended.stderr


class TestCalibrationText:
    """Text that cannot be used."""

    @pytest.mark.parametrize(
        ("name", "data", "says"),
        [
            ("no.txt", None, "there is no file"),
            ("empty.txt", b"", "holds no text"),
            ("blank.txt", b" \n\t\n", "holds no text"),
            ("latin.txt", "naïve".encode("latin-1"), "is not UTF-8 text (byte 2)"),
            ("cut.jsonl", b'{"text": "one"}\n{"text": \n', "line 2 is not valid JSON"),
            ("other.jsonl", b'{"body": "one"}\n', "line 1 has neither `text`, `messages`"),
            ("list.jsonl", b"[1, 2]\n", "line 1 has neither"),
            ("empty.jsonl", b"\n", "holds no text"),
            (
                "chat.jsonl",
                b'{"messages": [{"role": "user", "content": "hello"}]}\n',
                "has no chat template",
            ),
        ],
    )
    def test_files(
        self,
        name: str,
        data: bytes | None,
        says: str,
        quantize: Callable[..., Ended],
        tmp_path: Path,
    ) -> None:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        refused(quantize("--calibration", tmp_path / name), says)
        assert not (tmp_path / "out").exists()

    def test_none_at_all(self, commands: Commands, model: Path, tmp_path: Path) -> None:
        ended = commands.run("quantize", model, tmp_path / "out", "--group-size", 32)
        refused(ended, "gptq needs calibration text: --calibration")

    def test_a_tokenizer_of_another_model(
        self, quantize: Callable[..., Ended], model: Path, tmp_path: Path
    ) -> None:
        tensors = load_file(model / SINGLE_FILE)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:100].clone()
        save_file(tensors, model / SINGLE_FILE, metadata={"format": "pt"})
        with edited_json(model / "config.json") as config:
            config["vocab_size"] = 100
        refused(quantize(), "vocabulary has 100 tokens: is it another model's tokenizer?")

    def test_a_model_without_tokenizer(self, quantize: Callable[..., Ended], model: Path) -> None:
        for file in model.glob("tokenizer*"):
            file.unlink()
        refused(quantize(), "has no usable tokenizer")


class TestOutput:
    """Where the result cannot go."""

    def test_a_folder_with_something_else(
        self, quantize: Callable[..., Ended], tmp_path: Path
    ) -> None:
        out = tmp_path / "mine"
        out.mkdir()
        (out / "thesis.tex").write_text("ten years of work")
        for options in ([], ["--restart"]):
            refused(quantize(*options, out=out), "already holds something else")
            assert contents(out).keys() == {"thesis.tex"}

    def test_the_model_itself(self, quantize: Callable[..., Ended], model: Path) -> None:
        before = contents(model)
        for options in ([], ["--restart"]):
            refused(quantize(*options, out=model), str(model), "another folder")
            assert contents(model) == before

    def test_a_file(self, quantize: Callable[..., Ended], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("here")
        refused(quantize(out=tmp_path / "file"), "is a file, not a folder")
        assert (tmp_path / "file").read_text() == "here"

    def test_below_a_file(self, quantize: Callable[..., Ended], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("here")
        refused(quantize(out=tmp_path / "file" / "out"), "cannot write to", "Not a directory")

    def test_an_empty_folder_is_fine(self, quantize: Callable[..., Ended], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        assert quantize().code == 0


class TestDisk:
    """A write that fails ends the run in one sentence; with room again the same command goes on."""

    @pytest.mark.sampled(4)
    @pytest.mark.parametrize("largest", [700, 5_000, 30_000, 300_000])
    def test_files_that_must_not_grow(
        self,
        largest: int,
        quantize: Callable[..., Ended],
        tmp_path: Path,
    ) -> None:
        ended = quantize(largest_file=largest)
        sentence = ended.sentence
        assert ended.code == 1, sentence
        assert "cannot write" in sentence
        assert "File too large" in sentence
        assert not (tmp_path / "out" / "config.json").exists()
        assert not list((tmp_path / "out").glob("*.partial"))
        assert quantize().code == 0
        assert quantize(out=tmp_path / "fresh").code == 0
        assert contents(tmp_path / "out") == contents(tmp_path / "fresh")

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small tmpfs (root, or CAP_SYS_ADMIN)")
        yield disk
        subprocess.run(["umount", str(disk)], check=True)

    @staticmethod
    def resize(disk: Path, kilobytes: int) -> None:
        remount = ["mount", "-o", f"remount,size={kilobytes}k", str(disk)]
        subprocess.run(remount, check=True)

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("room", [4, 64, 400])
    def test_a_disk_that_fills_up(
        self, room: int, quantize: Callable[..., Ended], disk: Path, tmp_path: Path
    ) -> None:
        assert quantize(out=disk / "out", largest_file=5_000).code == 1  # it has begun
        self.resize(disk, shutil.disk_usage(disk).used // 1024 + room)
        ended = quantize(out=disk / "out")
        sentence = ended.sentence
        assert ended.code == 1, sentence
        assert "the disk is full" in sentence
        assert "run the same command again" in sentence
        assert not (disk / "out" / "config.json").exists()
        self.resize(disk, 1 << 16)
        assert quantize(out=disk / "out").code == 0
        assert quantize(out=tmp_path / "fresh").code == 0
        assert contents(disk / "out") == contents(tmp_path / "fresh")

    def test_a_disk_that_is_too_small_from_the_start(
        self, quantize: Callable[..., Ended], disk: Path
    ) -> None:
        self.resize(disk, 400)
        ended = quantize(out=disk / "out")
        assert ended.code == 2
        assert "has room for" in ended.sentence and "the run needs" in ended.sentence
        self.resize(disk, 1 << 16)
        assert quantize(out=disk / "out").code == 0


class TestNumbers:
    """NaN is a failed run that names the layer."""

    def test_in_a_weight(self, quantize: Callable[..., Ended], model: Path, tmp_path: Path) -> None:
        tensors = load_file(model / SINGLE_FILE)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
        save_file(tensors, model / SINGLE_FILE, metadata={"format": "pt"})
        refused(quantize(), "model.layers.1.mlp.up_proj: NaN or infinity in the weight", code=1)
        assert not (tmp_path / "out" / "config.json").exists()

    def test_in_the_embedding(
        self, quantize: Callable[..., Ended], model: Path, tmp_path: Path
    ) -> None:
        tensors = load_file(model / SINGLE_FILE)
        tensors["model.embed_tokens.weight"][:] = torch.inf
        save_file(tensors, model / SINGLE_FILE, metadata={"format": "pt"})
        refused(quantize(), "model.embed_tokens.weight holds NaN or infinity (row 0)")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["inspect", "nowhere"], "there is no folder nowhere"),
        (["verify", "nowhere"], "there is no folder nowhere"),
        (["generate", "nowhere", "x"], "there is no folder nowhere"),
        (["eval", "nowhere", "--text", "python-stdlib"], "there is no folder nowhere"),
        (["eval", "MODEL", "--text", "nothing.txt"], "there is no file 'nothing.txt'"),
        (["eval", "MODEL", "--text", "TEXT", "--dtype", "int4"], "dtype 'int4' is not supported"),
        (["eval", "MODEL", "--text", "TEXT", "--window", 1], "window 1"),
        (["eval", "MODEL", "--text", "TEXT", "--stride", 0], "stride 0"),
        (["eval", "MODEL", "--text", "TEXT", "--max-tokens", 1], "1 tokens"),
        (["generate", "MODEL", ""], "prompt"),
        (["generate", "MODEL", "x", "--max-new-tokens", 0], "max-new-tokens"),
    ],
)
def test_other_commands(
    command: list[str], says: str, commands: Commands, text_model: Path, text: Path
) -> None:
    places = {"MODEL": text_model, "TEXT": text}
    ended = commands.run(*(places.get(str(part), part) for part in command))
    assert says in ended.sentence
    assert ended.code == 2


def test_an_error_with_json_is_one_object_too(commands: Commands) -> None:
    ended = commands.run("inspect", "nowhere", "--json")
    assert ended.code == 2
    assert ended.json == {
        "error": "there is no folder nowhere, and it is not a model id of the form owner/name",
        "kind": "CheckpointError",
    }
    assert ended.sentence == ended.json["error"]


class TestSideFiles:
    """Damaged files beside the weights, and configs that ask for what is not there: one sentence."""

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("tokenizer.json", "[]"), ("tokenizer.json", "null"), ("tokenizer_config.json", "[]"),
            ("generation_config.json", '{"repetition_penalty": 0.0}'),
            ("generation_config.json", '{"eos_token_id": "x"}'),
            ("generation_config.json", "[]"),
        ],
    )  # fmt: skip
    def test_generate(
        self, name: str, text: str, text_model: Path, tmp_path: Path, commands: Commands
    ) -> None:
        folder = Path(shutil.copytree(text_model, tmp_path / "model"))
        (folder / name).write_text(text)
        refused(commands.run("generate", folder, "def f(", "--max-new-tokens", 2))

    @pytest.mark.parametrize(
        "changes",
        [
            {"is_encoder_decoder": True}, {"num_labels": 10**9}, {"model_type": "m\x1b[2J" * 30_000},
            {"quantization_config": {"quant_method": "\x1b]0;title\x07"}},
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("command", ["generate", "quantize", "plan"])
    def test_configs(
        self, command: str, changes: dict[str, Any], text_model: Path, tmp_path: Path,
        commands: Commands,
    ) -> None:  # fmt: skip
        folder = Path(shutil.copytree(text_model, tmp_path / "model"))
        with edited_json(folder / "config.json") as config:
            config.update(changes)
        words = {
            "generate": ["x"],
            "quantize": [tmp_path / "out", "--method", "rtn", "--group-size", 32],
            "plan": ["--group-size", 32],
        }[command]
        ended = commands.run(command, folder, *words)
        assert len(refused(ended)) < 1000
        assert "\x1b" not in ended.stderr + ended.stdout and "\x07" not in ended.stderr
