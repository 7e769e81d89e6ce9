"""Pieces of text: whole characters that join to the text; stop strings wherever pieces are cut."""

from __future__ import annotations

import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from roundwise.inference.detokenizer import Detokenizer, StopStrings
from roundwise.system.hub import bundled_model

TOKENIZER = transformers.AutoTokenizer.from_pretrained(bundled_model())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=30), st.lists(st.integers(0, 4095), max_size=30))
def test_pieces_join_to_the_whole(prompt: list[int], ids: list[int]) -> None:
    """For any tokens, also those that are parts of characters or never become one."""
    tokenizer = TOKENIZER
    detokenizer = Detokenizer(tokenizer, prompt)
    joined = "".join([*(detokenizer.add(token) for token in ids), detokenizer.flush()])
    whole, before = (tokenizer.decode(x, skip_special_tokens=True) for x in (prompt + ids, prompt))
    if not before.endswith(
        "\N{REPLACEMENT CHARACTER}"
    ):  # otherwise prompt and answer share a character
        assert joined == whole[len(before) :]


def test_a_slow_tokenizer_gives_whole_characters() -> None:
    tokenizer = transformers.ByT5Tokenizer()  # in Python; one token per byte
    detokenizer = Detokenizer(
        tokenizer, tokenizer("Preis: ", add_special_tokens=False)["input_ids"]
    )
    pieces = [
        detokenizer.add(token) for token in tokenizer("5 €!", add_special_tokens=False)["input_ids"]
    ]
    assert pieces == ["5", " ", "", "", "€", "!"]
    assert detokenizer.flush() == ""


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_are_found_wherever_pieces_are_cut(text: str, stops: list[str]) -> None:
    search = StopStrings(tuple(stops))
    returned = ""
    for character in text:
        returned += search.add(character)
    returned += search.flush()
    # The stop string that is complete first ends the answer.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    first = min((end for end, _ in ends), default=None)
    assert search.matched is bool(ends)
    assert returned == (
        text if first is None else text[: min(at for end, at in ends if end == first)]
    )
