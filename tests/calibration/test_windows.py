"""The assistant's tokens in chats, and batches in which only those count."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.calibration.dataset import load_calibration
from roundwise.calibration.records import Chat
from roundwise.calibration.windows import assistant_tokens
from roundwise.checkpoint.quantized_layers import quantized_layers
from roundwise.checkpoint.reader import Checkpoint
from roundwise.config import CalibrationConfig
from roundwise.errors import CalibrationError

CHAT = [
    {"role": "system", "content": "You write Python."},
    {"role": "user", "content": "A class?"},
    {"role": "assistant", "content": "class A:\n    pass"},
    {"role": "user", "content": "A function?"},
    {"role": "assistant", "content": "def f(x):\n    return x"},
]
ANSWERS = "class A:\n    pass<end>\ndef f(x):\n    return x<end>\n"
TURN = "<{{ m.role }}>\n{{ m.content }}<end>\n"
PLAIN = (
    "{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>\n{% generation %}{{ m.content }}"
    "<end>\n{% endgeneration %}{% else %}" + TURN + "{% endif %}{% endfor %}"
)
# Renders earlier answers shorter, as templates do that drop reasoning.
FORGETFUL = (
    "{% for m in messages %}{% if loop.last %}"
    + TURN
    + "{% else %}{{ m.role }}{% endif %}{% endfor %}"
)
SETTINGS: dict[str, Any] = {"samples": 4, "seq_len": 32, "batch_size": 2, "seed": 0}


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def chat_model(tokenizer: Any, tiny: Path, tmp_path: Path) -> Path:
    """A copy of the bundled model whose tokenizer has a chat template."""
    tokenizer.chat_template = PLAIN
    folder = Path(shutil.copytree(tiny, tmp_path / "chat-model"))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(6)))
    return file


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_the_answers_count(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    tokens, counted = assistant_tokens(Chat(CHAT), tokenizer)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert tokens == list(whole)
    assert len(counted) == len(tokens)
    answers = [token for token, count in zip(tokens, counted, strict=True) if count]
    assert tokenizer.decode(answers) == ANSWERS


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(CalibrationError, match=r"turn 3 of a chat cannot be located"):
        assistant_tokens(Chat(CHAT), tokenizer)


def test_only_answers_count_in_batches(tokenizer: Any, chats: Path) -> None:
    tokenizer.chat_template = PLAIN
    loaded = load_calibration(
        str(chats), tokenizer, CalibrationConfig(**SETTINGS, only="assistant")
    )
    every = load_calibration(str(chats), tokenizer, CalibrationConfig(**SETTINGS))
    assert loaded.record.sha256 != every.record.sha256
    assert loaded.record.as_json()["only"] == "assistant"
    assert "only" not in every.record.as_json()
    assert all(batch.counted is None for batch in every.batches)
    counting = [batch.counting for batch in loaded.batches]
    assert (
        loaded.record.tokens
        == sum(int(mask.sum()) for mask in counting if mask is not None)
        < every.record.tokens
    )
    for batch in loaded.batches:
        assert batch.counted is not None
        assert bool(batch.counted.any(-1).all())  # no window without an answer
        text = tokenizer.decode(batch.input_ids[batch.counted])
        assert "Python" not in text
        assert "function?" not in text


def test_windows_without_an_answer_are_not_sampled(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = PLAIN
    user = {"role": "user", "content": "x = 1\n" * 400}
    chat = [user, {"role": "assistant", "content": "y = 2"}, user]
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"messages": chat}))
    loaded = load_calibration(str(file), tokenizer, CalibrationConfig(**SETTINGS, only="assistant"))
    assert loaded.record.samples <= 2
    assert any("gives only" in line for line in loaded.not_as_asked)
    file.write_text(json.dumps({"messages": chat[:1]}))
    with pytest.raises(CalibrationError, match="no tokens by the assistant"):
        load_calibration(str(file), tokenizer, CalibrationConfig(**SETTINGS, only="assistant"))


@pytest.mark.parametrize(
    ("source", "only", "why"),
    [
        ("text", "assistant", "is for chats, but the calibration contains plain text"),
        ("chats", "user", "use assistant"),
        ("list", "assistant", "a list of windows holds no chats"),
    ],
)
def test_refusals(
    source: str, only: str, why: str, tokenizer: Any, chats: Path, text: Path
) -> None:
    tokenizer.chat_template = PLAIN
    given: Any = {"text": str(text), "chats": str(chats), "list": [[1, 2, 3]]}[source]
    with pytest.raises(CalibrationError, match=why):
        load_calibration(given, tokenizer, CalibrationConfig(**SETTINGS, only=only))


def test_only_the_answers_are_fitted(
    tokenizer: Any, chat_model: Path, chats: Path, tmp_path: Path
) -> None:
    """The inputs of the first layers depend on the token only: the answers alone give the same."""
    config = rw.QuantizeConfig(
        recipe="textbook", damp_percent=0.01, dynamic={r"layers\.[^0]": None}
    )
    loaded = load_calibration(
        str(chats), tokenizer, CalibrationConfig(**SETTINGS, only="assistant")
    )
    answers = [ids for b in loaded.batches for ids in b.input_ids[b.counted].tolist()]
    options = {"samples": 4, "seq_len": 32, "batch_size": 2}
    made = rw.quantize(chat_model, tmp_path / "a", config, str(chats), **options, only="assistant")
    same = rw.quantize(
        chat_model, tmp_path / "b", config, [answers], samples=1, seq_len=len(answers), batch_size=1
    )
    every = rw.quantize(chat_model, tmp_path / "c", config, str(chats), **options)
    assert made.layers[0]["tokens"] == len(answers) == loaded.record.tokens
    errors = [result.layers[0]["relative_error"] for result in (made, same, every)]
    # The model computes in bfloat16, and batches of other shapes are rounded differently.
    assert errors[0] == pytest.approx(errors[1], rel=2e-3)
    assert errors[0] != pytest.approx(errors[2], rel=1e-2)
    name = made.layers[0]["name"]
    codes = [
        next(x for x in quantized_layers(Checkpoint(tmp_path / n)) if x.name == name).read().codes
        for n in "ab"
    ]
    assert (codes[0] == codes[1]).float().mean() > 0.999
    assert torch.equal(codes[0], codes[0].clamp(0, 15))


def test_the_command_and_its_repetition_from_the_manifest(
    chat_model: Path, chats: Path, tmp_path: Path, commands: Any
) -> None:
    made = commands.run(
        "quantize", chat_model, tmp_path / "out", "--calibration", chats, "--only", "assistant",
        "--samples", 4, "--seq-len", 32, "--recipe", "textbook",
    )  # fmt: skip
    assert made.code == 0, made.stderr
    again = commands.run(
        "quantize", "--from-manifest", tmp_path / "out", "--output", tmp_path / "again", "--json"
    )
    assert again.code == 0, again.stderr
    assert again.json["same"] is True
