"""What belongs to a model is carried to a result, in its folders; what is not is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.side_files import MAX_FOLDER_FILES, find_side_files
from roundwise.checkpoint.writer import copy_side_files
from roundwise.convert import convert
from roundwise.errors import CheckpointError
from roundwise.verify import audit
from tests.helpers import Commands, contents

#: Files of the bundled model.
OF_TINY = [
    "README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "train.py",
]  # fmt: skip
RTN = rw.QuantizeConfig(method="rtn", group_size=32)


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def add(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def found(folder: Path) -> tuple[list[str], list[str]]:
    files = find_side_files(folder, [folder / "model.safetensors"])
    names = [path.relative_to(folder).as_posix() for path in files.carried]
    return [name for name in names if name not in OF_TINY], [*files.left_out]


class TestFolders:
    """A folder is carried whole or not at all."""

    def test_of_sentence_transformers(self, folder: Path, tmp_path: Path) -> None:
        modules = [
            {"idx": 0, "path": ""},
            {"idx": 1, "path": "1_Pooling"},
            {"idx": 2, "path": "2_Dense"},
        ]
        add(folder, "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin")
        (folder / "modules.json").write_text(json.dumps(modules))
        save_file({"linear.weight": torch.ones(2, 2)}, folder / "2_Dense" / "model.safetensors")
        result = rw.quantize(folder, tmp_path / "out", RTN, strict=True)
        assert result.warnings == []
        source, out = contents(folder), contents(tmp_path / "out")
        for name in source:
            if name.startswith(("1_", "2_", "modules")):
                assert out[name] == source[name]
        assert audit(tmp_path / "out", against=Checkpoint(folder)).failures == []
        (tmp_path / "out" / "2_Dense" / "model.safetensors").unlink()
        failures = audit(tmp_path / "out", against=Checkpoint(folder)).failures
        assert "2_Dense/model.safetensors is missing" in failures

    def test_of_chat_templates(self, folder: Path, tmp_path: Path) -> None:
        add(folder, "additional_chat_templates/tool_use.jinja", "chat_template.jinja")
        rw.quantize(folder, tmp_path / "out", RTN)
        convert(tmp_path / "out", tmp_path / "dense", "dense")
        for out in ("out", "dense"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / out)
            assert {*tokenizer.chat_template} == {"default", "tool_use"}

    def test_nested_ones(self, folder: Path, tmp_path: Path) -> None:
        add(folder, "assets/a/b/c.txt", "assets/.hidden", "assets/.cache/x.txt")
        add(folder, "__pycache__/train.cpython-311.pyc", "assets/__pycache__/x.pyc")
        assert found(folder) == (["assets/a/b/c.txt"], [])
        (tmp_path / "out").mkdir()
        assert "assets/a/b/c.txt" in copy_side_files(Checkpoint(folder), tmp_path / "out")
        assert (tmp_path / "out" / "assets" / "a" / "b" / "c.txt").read_text() == "{}"

    def test_with_weights_that_the_model_does_not_name(self, folder: Path, tmp_path: Path) -> None:
        add(
            folder,
            "onnx/config.json",
            "onnx/model.onnx",
            "original/params.json",
            "original/a.00.pth",
        )
        assert found(folder) == ([], ["onnx/", "original/"])
        (line,) = rw.quantize(folder, tmp_path / "out", RTN).warnings
        assert line == f"not carried over from {folder}: onnx/, original/"
        assert not (tmp_path / "out" / "onnx").exists()

    def test_of_adapters_beside_the_model(self, folder: Path) -> None:
        add(folder, "speech-lora/adapter_config.json", "speech-lora/adapter_model.safetensors")
        names = ["speech-lora/adapter_config.json", "speech-lora/adapter_model.safetensors"]
        assert found(folder) == (names, [])

    def test_with_too_many_files(self, folder: Path) -> None:
        add(folder, *(f"many/{i}.txt" for i in range(MAX_FOLDER_FILES + 1)))
        assert found(folder) == ([], ["many/"])

    def test_results_of_roundwise(self, folder: Path) -> None:
        rw.quantize(folder, folder / "out", RTN)
        add(folder, "empty/.gitkeep", ".git/config")
        assert found(folder) == ([], [])

    @pytest.mark.parametrize("text", ["{", "[3]", '[{"path": 3}]', "[" * 100_000])
    def test_a_damaged_list_of_modules(self, text: str, folder: Path) -> None:
        add(folder, "1_Dense/model.safetensors")
        (folder / "modules.json").write_text(text)
        assert found(folder) == (["modules.json"], ["1_Dense/"])

    def test_links_out_of_the_model(self, folder: Path, tmp_path: Path) -> None:
        add(tmp_path, "secret/key.txt")
        (folder / "assets").mkdir()
        (folder / "assets" / "a.txt").symlink_to(tmp_path / "secret" / "key.txt")
        with pytest.raises(CheckpointError, match=r"a\.txt is a link to .*, outside the folder"):
            Checkpoint(folder)

    def test_a_folder_that_is_a_link_out_of_the_model(self, folder: Path, tmp_path: Path) -> None:
        add(tmp_path, "secret/key.txt")
        (folder / "assets").symlink_to(tmp_path / "secret")
        assert found(folder) == ([], ["assets/"])


def test_an_adapter_beside_a_merged_model(folder: Path, tmp_path: Path, commands: Commands) -> None:
    """Its config without its weights made the result impossible to open."""
    add(folder, "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    ended = commands.run(
        "quantize", folder, tmp_path / "out", "--method", "rtn", "--group-size", "32"
    )
    assert ended.code == 0, ended.stderr
    said = "adapter_config.json, adapter_model.bin, adapter_model.safetensors"
    assert f"not carried over from {folder}: {said}" in ended.stdout.replace("\n", " ")
    assert not list((tmp_path / "out").glob("adapter_*"))
    rw.load(tmp_path / "out")


def test_an_adapter_alone(tmp_path: Path) -> None:
    add(tmp_path, "adapter_config.json", "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is an adapter, not a model: merge it"):
        Checkpoint(tmp_path)


def test_other_copies_of_the_weights_are_named(folder: Path, tmp_path: Path) -> None:
    add(
        folder,
        "pytorch_model.bin",
        "model-q4.gguf",
        "pytorch_model.bin.index.json",
        "consolidated.pth",
    )
    left_out = [
        "consolidated.pth",
        "model-q4.gguf",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]
    assert found(folder) == ([], left_out)
    rw.quantize(folder, tmp_path / "q", RTN)
    (tmp_path / "q" / "x.gguf").write_text("")
    assert Checkpoint(tmp_path / "q").left_out() == [
        f"not carried over from {tmp_path / 'q'}: x.gguf"
    ]


class TestUnfinished:
    """A folder without config.json is what it is."""

    def test_a_run_that_was_stopped(
        self, text_model: Path, text: Path, tmp_path: Path, commands: Commands
    ) -> None:
        out, steps = tmp_path / "out", iter(range(100))

        def stop(step: object) -> None:
            if getattr(step, "layer", None) is None and next(steps) == 1:
                raise KeyboardInterrupt

        options = {"samples": 4, "seq_len": 32}
        config = rw.QuantizeConfig(group_size=32, recipe="textbook")
        with pytest.raises(rw.RoundwiseError, match="2 of 3 blocks are finished"):
            rw.quantize(text_model, out, config, str(text), progress=stop, **options)
        says = (
            f"{out} is an unfinished run, 2 of 3 blocks are done: resume it with the command that "
            f"started it, `roundwise quantize {text_model} {out}`"
        )
        for command in [
            ["inspect", out], ["verify", out], ["generate", out, "x"], ["eval", out, "--text", text],
            ["convert", out, tmp_path / "x", "--to", "dense"], ["quantize", out, tmp_path / "y"],
        ]:  # fmt: skip
            ended = commands.run(*command)
            assert ended.code == 2 and says in ended.sentence

    def test_before_the_first_block(self, tmp_path: Path) -> None:
        add(tmp_path, ".roundwise/lock")
        (tmp_path / ".roundwise" / "journal.jsonl").write_text('{"given": {"model": "a"}}\n')
        with pytest.raises(CheckpointError, match="unfinished run, no block is done: resume"):
            Checkpoint(tmp_path)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]\n[[3]]\n", '{"given": 3}\n[{"shard": "x"}]\n', "\xff"]
    )
    def test_a_damaged_journal(self, text: str, tmp_path: Path) -> None:
        add(tmp_path, ".roundwise/lock")
        (tmp_path / ".roundwise" / "journal.jsonl").write_text(text)
        with pytest.raises(CheckpointError, match="unfinished run, its journal is damaged"):
            Checkpoint(tmp_path)

    def test_no_run_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"has no config\.json, so it is not a model"):
            Checkpoint(tmp_path)


@pytest.mark.parametrize("length", [246, 247, 248, 255])
def test_names_as_long_as_file_systems_take(
    length: int, copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, name = copy_of("llama"), "é" * 100 + "x" * (length - 200)
    add(folder, name, f"folder/{name}")
    result = rw.quantize(folder, tmp_path / "out", RTN)
    assert (result.output / name).exists() and (result.output / "folder" / name).exists()
    assert not list(result.output.rglob("*.partial"))
