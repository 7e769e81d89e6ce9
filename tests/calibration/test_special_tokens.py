"""Special tokens around windows, as tokenizers of several families add them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers.processors import TemplateProcessing

import roundwise as rw
from roundwise.calibration.dataset import Calibration, load_calibration
from roundwise.calibration.self_generated import generate_windows
from roundwise.calibration.special_tokens import (
    NO_SPECIAL_TOKENS,
    SpecialTokens,
    special_tokens,
)
from roundwise.checkpoint.reader import Checkpoint
from roundwise.config import CalibrationConfig
from roundwise.errors import CalibrationError
from tests.helpers import edited_json

#: Kind of model -> what its tokenizer puts around a text; token "<a>" has id 1, "<b>" id 2.
TEMPLATES = {
    "gpt2": "$A",
    "llama": "<a> $A",
    "bert": "<a> $A <b>",
    "t5": "$A <b>",
    "two": "<a> <b> $A",
}
EXPECTED = {
    "gpt2": SpecialTokens(),
    "llama": SpecialTokens((1,)),
    "bert": SpecialTokens((1,), (2,)),
    "t5": SpecialTokens((), (2,)),
    "two": SpecialTokens((1, 2)),
}


def tokenizer_of(template: str, folder: Path) -> Any:
    """The bundled model's tokenizer with special tokens: its ids 1 and 2 are called <a> and <b>."""
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if template != "$A":
        made.post_processor = TemplateProcessing(
            single=template, special_tokens=[("<a>", 1), ("<b>", 2)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture
def make(tiny: Path) -> Callable[[str], Any]:
    return lambda kind: tokenizer_of(TEMPLATES[kind], tiny)


def load(source: Any, tokenizer: Any, **changes: Any) -> Calibration:
    usual = {"samples": 6, "seq_len": 16, "batch_size": 6, "seed": 0}
    return load_calibration(source, tokenizer, CalibrationConfig(**{**usual, **changes}))


def rows(calibration: Calibration) -> list[list[int]]:
    return [
        row for batch in calibration.batches for row in batch.input_ids.tolist()
    ]  # fmt: skip


@pytest.mark.parametrize("kind", TEMPLATES)
def test_found_by_trying(kind: str, make: Callable[[str], Any]) -> None:
    assert special_tokens(make(kind)) == EXPECTED[kind]


def test_no_tokenizer_adds_nothing() -> None:
    assert special_tokens(None) == NO_SPECIAL_TOKENS


def test_tokenizers_of_other_libraries_are_asked_the_same_way() -> None:
    class Spaces:
        """Merges the special token with the text: it cannot be told what belongs to which."""

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, 2] if options.get("add_special_tokens", True) else [3]}

    with pytest.raises(CalibrationError, match=r"Spaces cannot be told.*--no-special-tokens"):
        special_tokens(Spaces())


@pytest.mark.parametrize("kind", TEMPLATES)
def test_every_window_of_a_text_has_them(kind: str, make: Callable[[str], Any], text: Path) -> None:
    tokenizer, special = make(kind), EXPECTED[kind]
    found = load(str(text), tokenizer)
    stream = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    for row in rows(found):
        assert len(row) == 16
        inside = row[len(special.prefix) : 16 - len(special.suffix)]
        assert special.around(inside) == row
        assert any(stream[i : i + len(inside)] == inside for i in range(len(stream)))
    assert found.record.special_tokens is True
    assert found.record.tokens == 6 * 16


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_string_is_tokenized_as_the_tokenizer_does(kind: str, make: Callable[[str], Any]) -> None:
    tokenizer = make(kind)
    assert rows(load(["import os"], tokenizer, samples=1)) == [tokenizer("import os")["input_ids"]]
    # Cut to the length of a window, special tokens included, and still complete.
    short = rows(load(["import os, sys, json"], tokenizer, samples=1, seq_len=4))[0]
    inside = tokenizer("import os, sys, json", add_special_tokens=False)["input_ids"]
    assert short == EXPECTED[kind].around(inside[: 4 - EXPECTED[kind].count])


def test_token_ids_are_taken_as_they_are(make: Callable[[str], Any]) -> None:
    assert rows(load([[5, 6, 7]], make("bert"), samples=1)) == [[5, 6, 7]]


def test_they_can_be_left_out(make: Callable[[str], Any], text: Path) -> None:
    found = load(str(text), make("bert"), special_tokens=False)
    assert found.record.special_tokens is False
    assert rows(found) == rows(load(str(text), make("gpt2")))


def test_a_template_that_writes_them_itself_gets_no_second_one(
    make: Callable[[str], Any], tmp_path: Path
) -> None:
    tokenizer = make("llama")
    tokenizer.add_special_tokens({"bos_token": "<a>"})
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<a> $A", special_tokens=[("<a>", begin)]
    )
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "import os"}]}))
    (row,) = rows(load(str(file), tokenizer, samples=1))
    assert row == tokenizer("import os")["input_ids"]
    assert row.count(begin) == 1


def test_they_do_not_count_where_only_answers_do(
    make: Callable[[str], Any], tmp_path: Path
) -> None:
    tokenizer = make("bert")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    chat = [{"role": "user", "content": "a list?"}, {"role": "assistant", "content": "x = []"}]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": chat}))
    (batch,) = load(str(file), tokenizer, samples=1, seq_len=64, only="assistant").batches
    row, counting = batch.input_ids[0], batch.counting
    assert (row[0], row[-1]) == (1, 2)
    assert counting is not None
    assert not counting[0, 0]
    assert not counting[0, -1]
    answer = tokenizer("x = []\n", add_special_tokens=False)["input_ids"]
    assert row[counting[0]].tolist() == answer


def test_a_window_needs_room_for_text(make: Callable[[str], Any], text: Path) -> None:
    with pytest.raises(CalibrationError, match="seq_len=2: every window has 2 special tokens"):
        load(str(text), make("bert"), seq_len=2)


def test_text_of_the_model_itself_begins_with_them(make: Callable[[str], Any], tiny: Path) -> None:
    config = CalibrationConfig(samples=2, seq_len=8, batch_size=2)
    windows = generate_windows(Checkpoint(tiny), make("two"), config)
    assert [window[:2] for window in windows] == [[1, 2], [1, 2]]
    assert [len(window) for window in windows] == [8, 8]


@pytest.fixture(scope="module")
def with_bos(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a tokenizer that puts token 1 first."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("bos") / "tiny-bos"))
    tokenizer_of("<a> $A", tiny).save_pretrained(folder)
    return folder


def test_perplexity_of_every_window_begins_with_them(with_bos: Path) -> None:
    model, tokenizer = rw.load(with_bos, dtype=torch.float32)
    ids = tokenizer(Path(shutil.__file__).read_text()[:3000], add_special_tokens=False)["input_ids"]
    ids = ids[:200]
    total = 0.0
    for begin in range(0, 200, 40):
        row = torch.tensor([[1, *ids[begin : begin + 40]]])
        with torch.no_grad():
            total += float(model(row, labels=row).loss) * 40  # all of the text is predicted
    found = rw.perplexity(model, tokenizer, ids, window=41)
    assert found.perplexity == pytest.approx(float(torch.tensor(total / 200).exp()), rel=1e-5)
    assert (found.tokens, found.window, found.stride) == (200, 41, 40)
    plain = rw.perplexity(model, tokenizer, ids, window=41, special=NO_SPECIAL_TOKENS)
    assert plain == rw.perplexity(model, None, ids, window=41)
    assert plain.tokens == 195
    overlapping = rw.perplexity(model, tokenizer, ids, window=41, stride=13)
    assert overlapping.tokens == 200


def test_the_commands_take_them_from_the_tokenizer(
    with_bos: Path, text: Path, tmp_path: Path, commands: Any
) -> None:
    made = commands.run(
        "quantize", with_bos, tmp_path / "out", "--calibration", text, "--samples", 4,
        "--seq-len", 32, "--recipe", "textbook", "--json",
    )  # fmt: skip
    assert made.code == 0, made.stderr
    evaluate = ("eval", with_bos, "--text", text, "--window", 64, "--max-tokens", 500, "--json")
    model, tokenizer = rw.load(with_bos)
    expected = rw.perplexity(
        model, tokenizer, text.read_text(), window=64, stride=512, max_tokens=500
    )
    assert commands.run(*evaluate).json["perplexity"] == pytest.approx(expected.perplexity)
    assert commands.run(*evaluate).json["tokens"] == 500
    without = commands.run(*evaluate, "--no-special-tokens").json
    assert without["tokens"] < 500
    assert without["perplexity"] != pytest.approx(expected.perplexity, rel=1e-3)
    compared = commands.run(
        "compare", with_bos, tmp_path / "out", "--text", text, "--window", 64, "--max-tokens", 500,
        "--no-speed", "--json",
    ).json  # fmt: skip
    assert compared["perplexity"]["base"] == pytest.approx(expected.perplexity, rel=1e-6)


def test_a_manifest_of_before_is_repeated_without_them(
    with_bos: Path, text: Path, tmp_path: Path, commands: Any
) -> None:
    options = ("--calibration", text, "--samples", 4, "--seq-len", 32, "--recipe", "textbook")
    made = commands.run("quantize", with_bos, tmp_path / "out", *options, "--no-special-tokens")
    assert made.code == 0, made.stderr
    with edited_json(tmp_path / "out" / "roundwise.json") as manifest:
        del manifest["run"]["calibration"]["special_tokens"]
    again = commands.run(
        "quantize", "--from-manifest", tmp_path / "out", "--output", tmp_path / "again", "--json"
    )
    assert again.code == 0, again.stderr
    assert again.json["same"] is True
