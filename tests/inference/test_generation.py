"""Generating piece by piece: the pieces are the text, stop texts end it, and it can be stopped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import roundwise as rw
from roundwise.checkpoint.hub import bundled_model
from roundwise.errors import CheckpointError, ConfigError
from roundwise.inference.generation import Detokenizer, Generated, Sampling, StopTexts, generate
from roundwise.inference.prompts import encode_chat, encode_text, read_chat_template
from roundwise.system.device import parse_device
from tests.helpers import CHAT_TEMPLATE

PROMPT = "def read_file(path):"


@cache
def loaded() -> tuple[Any, Any]:
    return rw.load(bundled_model(), dtype=torch.float32)


def run(sampling: Sampling, prompt: str = PROMPT, **options: Any) -> tuple[Generated, list[str]]:
    model, tokenizer = loaded()
    pieces: list[str] = []
    ids = encode_text(tokenizer, prompt)
    return generate(model, tokenizer, ids, sampling, on_text=pieces.append, **options), pieces


def test_greedy_is_what_transformers_generates() -> None:
    model, tokenizer = loaded()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(
        input_ids=inputs["input_ids"], max_new_tokens=40, do_sample=False, pad_token_id=0
    )[0, inputs["input_ids"].shape[1] :]
    result, pieces = run(Sampling(40))
    assert result.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert "".join(pieces) == result.text
    assert len(pieces) > 20
    assert (result.tokens, result.finish) == (40, "length")
    assert result.prompt_tokens == inputs["input_ids"].shape[1]
    assert 0 < result.first_token_seconds < result.seconds
    assert result.prompt_tokens_per_second > 0
    assert result.tokens_per_second > 0


def test_the_end_of_the_text_is_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded()
    usual, _ = run(Sampling(20))
    # Whatever comes fifth is declared the end of texts.
    fifth = tokenizer(PROMPT + usual.text)["input_ids"][usual.prompt_tokens + 4]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [fifth])
    result, _ = run(Sampling(20))
    assert result.finish == "stop"
    assert result.tokens == 5


def test_a_stop_text_ends_it_and_is_left_out() -> None:
    usual, _ = run(Sampling(40))
    stop = usual.text[30:34]  # in the middle of tokens, most likely
    result, pieces = run(Sampling(40, stop=("no such text", stop)))
    assert result.finish == "stop"
    assert result.text == "".join(pieces) == usual.text[: usual.text.index(stop)]
    assert result.tokens < usual.tokens


def test_a_text_held_back_for_a_stop_text_is_given_at_the_end() -> None:
    usual, _ = run(Sampling(12))
    result, _ = run(Sampling(12, stop=(usual.text[-3:] + "never",)))
    assert result.text == usual.text


def test_it_can_be_cancelled() -> None:
    asked = iter([False, False, True])
    result, _ = run(Sampling(40), cancelled=lambda: next(asked))
    assert (result.tokens, result.finish) == (3, "cancelled")


def test_seeds_repeat() -> None:
    texts = [run(Sampling(16, temperature=1.2, seed=seed))[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_what_is_not_said_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded()
    monkeypatch.setattr(model.generation_config, "top_k", 1)
    assert run(Sampling(12, temperature=1.5, seed=3))[0].text == run(Sampling(12))[0].text
    sampled = Sampling(12, temperature=1.5, seed=3, top_k=0, top_p=0.9, min_p=0.01)
    assert run(sampled)[0].text != run(Sampling(12))[0].text


@pytest.mark.parametrize(("ids", "count"), [([], 1), ([5], 0)])
def test_nothing_to_do_is_refused(ids: list[int], count: int) -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        generate(*loaded(), ids, Sampling(count))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=30), st.lists(st.integers(0, 4095), max_size=30))
def test_pieces_join_to_the_whole(prompt: list[int], ids: list[int]) -> None:
    """Any tokens, also those that are parts of characters, or never become one."""
    _, tokenizer = loaded()
    detokenizer = Detokenizer(tokenizer, prompt)
    joined = "".join([*(detokenizer.add(token) for token in ids), detokenizer.rest()])
    whole, before = (tokenizer.decode(x, skip_special_tokens=True) for x in (prompt + ids, prompt))
    if not before.endswith("\N{REPLACEMENT CHARACTER}"):  # else the seam is inside a character
        assert joined == whole[len(before) :]


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_texts_are_found_wherever_they_are_cut(text: str, stops: list[str]) -> None:
    search = StopTexts(tuple(stops))
    given_out = ""
    for character in text:
        given_out += search.add(character)
    given_out += search.rest()
    # The stop text that is complete first ends the answer, as the text grows.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    first = min((end for end, _ in ends), default=None)
    assert search.found is bool(ends)
    assert given_out == (
        text if first is None else text[: min(at for end, at in ends if end == first)]
    )


class TestPrompts:
    @pytest.fixture
    def tokenizer(self, tiny: Path) -> Any:
        return rw.load(tiny)[1]

    def test_a_chat_goes_through_the_template(self, tokenizer: Any, tmp_path: Path) -> None:
        (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
        read_chat_template(tokenizer, tmp_path / "chat.jinja")
        messages = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hello"},
        ]
        ids = encode_chat(tokenizer, messages)
        assert tokenizer.decode(ids) == "# system: be brief\n# user: hello\n# assistant:"

    def test_without_a_template(self, tokenizer: Any) -> None:
        with pytest.raises(CheckpointError, match="no chat template: use plain completions"):
            encode_chat(tokenizer, [{"role": "user", "content": "hello"}])

    def test_messages_that_the_template_refuses(self, tokenizer: Any) -> None:
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(ConfigError, match="refuses these messages: roles must alternate"):
            encode_chat(tokenizer, [{"role": "user", "content": "hello"}])

    def test_a_template_cannot_reach_out(self, tokenizer: Any) -> None:
        tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        with pytest.raises(ConfigError, match="refuses these messages"):
            encode_chat(tokenizer, [{"role": "user", "content": "hello"}])

    def test_a_template_that_is_not_there(self, tokenizer: Any, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"missing\.jinja cannot be read"):
            read_chat_template(tokenizer, tmp_path / "missing.jinja")

    def test_an_empty_text(self, tokenizer: Any) -> None:
        with pytest.raises(ConfigError, match="the prompt is empty"):
            encode_text(tokenizer, "")


def test_devices() -> None:
    assert parse_device("cpu") == torch.device("cpu")
    assert parse_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="'tpu' is not known"):
        parse_device("tpu")
    with pytest.raises(ConfigError, match="torch sees"):
        parse_device("cuda:99")
