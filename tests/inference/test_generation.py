"""Text generation in pieces: the pieces are the text, stop strings end it, and it can be cancelled."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.errors import ConfigError
from roundwise.inference.generation import Generated, Sampling, generate
from roundwise.inference.prompts import encode_text
from roundwise.system.hub import bundled_model

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


def test_an_end_of_text_token_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded()
    usual, _ = run(Sampling(20))
    # The fifth generated token becomes the end-of-text token.
    fifth = tokenizer(PROMPT + usual.text)["input_ids"][usual.prompt_tokens + 4]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [fifth])
    result, _ = run(Sampling(20))
    assert result.finish == "stop"
    assert result.tokens == 5


def test_a_stop_string_ends_it_and_is_left_out() -> None:
    usual, _ = run(Sampling(40))
    stop = usual.text[30:34]  # most likely in the middle of a token
    result, pieces = run(Sampling(40, stop=("no such text", stop)))
    assert result.finish == "stop"
    assert result.text == "".join(pieces) == usual.text[: usual.text.index(stop)]
    assert result.tokens < usual.tokens


def test_text_held_back_for_a_stop_string_is_sent_at_the_end() -> None:
    usual, _ = run(Sampling(12))
    result, _ = run(Sampling(12, stop=(usual.text[-3:] + "never",)))
    assert result.text == usual.text


def test_it_can_be_cancelled() -> None:
    asked = iter([False, False, True])
    result, _ = run(Sampling(40), cancelled=lambda: next(asked))
    assert (result.tokens, result.finish) == (3, "cancelled")


def test_a_seed_makes_sampling_repeatable() -> None:
    texts = [run(Sampling(16, temperature=1.2, seed=seed))[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_defaults_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded()
    monkeypatch.setattr(model.generation_config, "top_k", 1)
    assert run(Sampling(12, temperature=1.5, seed=3))[0].text == run(Sampling(12))[0].text
    sampled = Sampling(12, temperature=1.5, seed=3, top_k=0, top_p=0.9, min_p=0.01)
    assert run(sampled)[0].text != run(Sampling(12))[0].text


@pytest.mark.parametrize(("ids", "count"), [([], 1), ([5], 0)])
def test_nothing_to_do_is_refused(ids: list[int], count: int) -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        generate(*loaded(), ids, Sampling(count))
