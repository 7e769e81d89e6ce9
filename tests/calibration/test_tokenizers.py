"""Every family's own tokenizer: windows begin and end as it does, once and not twice.

The tokenizers are made here of their classes' default vocabularies, which have the special tokens, and a
few words.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from roundwise.calibration.dataset import load_calibration
from roundwise.calibration.special_tokens import PROBES, special_tokens
from roundwise.config import CalibrationConfig
from tests.matrix.tiny import class_names, find

#: Words and letters that every tokenizer here knows as tokens.
WORDS = [f"word{letter}" for letter in "abcdefgh"]
LETTERS = sorted({letter for probe in PROBES for letter in probe})
TEXT = " ".join(WORDS[index % 7] for index in range(60))
#: A template that writes the beginning and the end itself, as most do.
TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token or '' }}"
)


def tokenizers_of_the_matrix() -> dict[str, list[str]]:
    """Class of tokenizers -> the classes of models in the matrix that transformers uses it for."""
    found: dict[str, list[str]] = {}
    for name in class_names():
        model_type = find(name).config_class.model_type
        kind = TOKENIZER_MAPPING_NAMES.get(model_type) or TOKENIZER_MAPPING_NAMES.get(
            model_type.removesuffix("_text")
        )
        if kind is not None:
            found.setdefault(kind, []).append(name)
    return found


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of transformers' own modules
    FAMILIES = tokenizers_of_the_matrix()


def made(kind: str) -> Any:
    """A tokenizer of a class; None: it takes more than text, or its special tokens are in its files."""
    try:
        tokenizer = getattr(transformers, kind)()
        tokenizer.add_tokens([*WORDS, *LETTERS])
        special = {*special_tokens(tokenizer).prefix, *special_tokens(tokenizer).suffix}
        plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    except Exception:
        return None
    unknown = tokenizer.unk_token_id if tokenizer.unk_token != tokenizer.eos_token else None
    return tokenizer if plain and unknown not in special and not special & {*plain} else None


@pytest.fixture
def tokenizer(kind: str) -> Any:
    return made(kind) or pytest.skip(f"{kind} cannot be made without files")


def rows(source: str, tokenizer: Any) -> list[list[int]]:
    config = CalibrationConfig(samples=3, seq_len=16, batch_size=1)
    return [
        row
        for batch in load_calibration(source, tokenizer, config).batches
        for row in batch.input_ids.tolist()
    ]


@pytest.mark.parametrize("kind", FAMILIES)
def test_windows_of_text(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    special = special_tokens(tokenizer)
    plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert special.around(plain) == tokenizer(TEXT)["input_ids"]
    (tmp_path / "a.txt").write_text(TEXT)
    for row in rows(str(tmp_path / "a.txt"), tokenizer):
        inside = row[len(special.prefix) : len(row) - len(special.suffix)]
        assert special.around(inside) == row
        assert not {*inside} & {*special.prefix, *special.suffix}
        assert len(row) == 16


@pytest.mark.parametrize("kind", FAMILIES)
def test_chats_of_a_template_that_writes_them_itself(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = TEMPLATE
    chat = {"messages": [{"role": "user", "content": "worda wordb"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(chat))
    (row,) = rows(str(tmp_path / "a.jsonl"), tokenizer)
    special = special_tokens(tokenizer)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is None:
        assert row[: len(special.prefix)] == [*special.prefix]
    else:
        assert row[0] == begin
        assert row.count(begin) == 1 + (begin == end), tokenizer.decode(row)
    if end is not None and special.suffix in ((), (end,)):
        assert row[-1] == end
        assert row.count(end) == 1 + (begin == end), tokenizer.decode(row)


def test_most_families_are_tried() -> None:
    kinds = [kind for kind in FAMILIES if made(kind) is not None]
    assert len(kinds) >= 35
    assert sum(len(FAMILIES[kind]) for kind in kinds) >= 120
