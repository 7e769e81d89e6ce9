"""Prompts: texts and chats become token ids; templates that fail are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import roundwise as rw
from roundwise.errors import CheckpointError, ConfigError
from roundwise.inference.prompts import encode_chat, encode_text, read_chat_template
from tests.helpers import CHAT_TEMPLATE


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    return rw.load(tiny)[1]


def test_a_chat_goes_through_the_template(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    read_chat_template(tokenizer, tmp_path / "chat.jinja")
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
    ]
    ids = encode_chat(tokenizer, messages)
    assert tokenizer.decode(ids) == "# system: be brief\n# user: hello\n# assistant:"


def test_without_a_template(tokenizer: Any) -> None:
    with pytest.raises(CheckpointError, match="no chat template: use plain completions"):
        encode_chat(tokenizer, [{"role": "user", "content": "hello"}])


def test_messages_that_the_template_refuses(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="refuses these messages: roles must alternate"):
        encode_chat(tokenizer, [{"role": "user", "content": "hello"}])


def test_a_template_cannot_access_python_internals(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ConfigError, match="refuses these messages"):
        encode_chat(tokenizer, [{"role": "user", "content": "hello"}])


def test_a_template_file_that_is_missing(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.jinja cannot be read"):
        read_chat_template(tokenizer, tmp_path / "missing.jinja")


def test_an_empty_text(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        encode_text(tokenizer, "")


def test_a_text_becomes_its_tokens(tokenizer: Any) -> None:
    ids = encode_text(tokenizer, "import os")
    assert all(type(token) is int for token in ids)
    assert tokenizer.decode(ids) == "import os"
