"""The tokens of an evaluation text, and windows that fit a model."""

from __future__ import annotations

from pathlib import Path

import roundwise as rw
from roundwise.calibration.special_tokens import NO_SPECIAL_TOKENS
from roundwise.cli.evaluation_text import evaluation_tokens, fitting_window


def test_tokens_are_those_of_the_tokenizer(text_model: Path, text: Path) -> None:
    tokenizer = rw.load(text_model)[1]
    whole = tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    ids, special = evaluation_tokens(str(text_model), str(text), None, special=False)
    assert ids == whole
    assert special == NO_SPECIAL_TOKENS
    assert evaluation_tokens(str(text_model), str(text), 7, special=True)[0] == whole[:7]
    assert evaluation_tokens(str(text_model), None, 7, special=True) == ([], NO_SPECIAL_TOKENS)


def test_a_window_is_no_longer_than_the_context(tiny: Path) -> None:
    assert fitting_window(str(tiny), 512) == 512
    assert fitting_window(str(tiny), 4096) == 2048
