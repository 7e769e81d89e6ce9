"""A tokenizer is loaded without its own code; why one cannot be used is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import CheckpointError
from roundwise.inference.load import require_tokenizer
from roundwise.model.tokenizer import load_tokenizer


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def refused(folder: Path, says: str) -> None:
    """The reason is the same for runs, and for what uses a loaded model."""
    with pytest.raises(CheckpointError, match=says) as error:
        load_tokenizer(Checkpoint(folder))
    assert "\n" not in str(error.value)
    _, tokenizer = rw.load(folder)
    assert tokenizer is None
    with pytest.raises(CheckpointError, match=says):
        require_tokenizer(tokenizer, folder)


def test_the_tokenizer_of_a_folder(folder: Path) -> None:
    tokenizer = load_tokenizer(Checkpoint(folder))
    assert tokenizer.decode(tokenizer("import os")["input_ids"]) == "import os"


def test_no_files(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(folder, "has no usable tokenizer: copy the original model's tokenizer files")


@pytest.mark.parametrize(
    "classes", ["tokenization_x.XTokenizer", ["tokenization_x.XTokenizer", None]]
)
def test_code_of_its_own(classes: str | list[str | None], folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "XTokenizer", "auto_map": {"AutoTokenizer": classes}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ran = tmp_path / "ran"
    (folder / "tokenization_x.py").write_text(f"open({str(ran)!r}, 'w')\nclass XTokenizer: pass\n")
    refused(
        folder, r"needs code of its own \(tokenization_x\.XTokenizer\), which roundwise never runs"
    )
    assert not ran.exists()


def test_code_that_is_not_needed(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(Checkpoint(folder))("import os")["input_ids"]


@pytest.mark.parametrize(
    "text", ["[]", "null", "{}", "3", '"x"', "{", '{"model": []}', "\x00\x1b[2J"]
)
def test_a_damaged_file(text: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(text)
    refused(folder, "has no usable tokenizer: ")


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"added_tokens_decoder": 3}'])
def test_a_damaged_config(text: str, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(text)
    refused(folder, "has no usable tokenizer: ")
