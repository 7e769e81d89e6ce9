"""Converts a text or a conversation to the token ids of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from roundwise.errors import CheckpointError, ConfigError, first_line

#: {"role": "user", "content": "..."}, as chat templates take it.
Message = dict[str, Any]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a text, with the special tokens that the tokenizer adds in front.

    Args:
        tokenizer: transformers tokenizer.
        text: the prompt.

    Raises:
        ConfigError: the text is empty, or the tokenizer makes no token of it.
    """
    ids = tokenizer(text, verbose=False)["input_ids"] if text else []
    if not ids:
        raise ConfigError("the prompt is empty: give some text to continue")
    return list(ids)


def encode_chat(
    tokenizer: Any, messages: list[Message], tools: Sequence[dict[str, Any]] = ()
) -> list[int]:
    """Returns the token ids of a conversation, up to where the answer begins.

    Args:
        tokenizer: transformers tokenizer with a chat template.
        messages: the conversation, oldest message first.
        tools: tools that the model may call, in OpenAI's format.

    Raises:
        CheckpointError: the model has no chat template, or it has none for tools.
        ConfigError: the template refuses these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(
            "the model has no chat template: use plain completions, or give a template with "
            "--chat-template FILE"
        )
    if tools and "tools" not in tokenizer.get_chat_template(tools=tools):
        raise CheckpointError("the model's chat template has no tools: ask without them")
    try:
        encoded = tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, add_generation_prompt=True, tokenize=True,
            return_dict=True,
        )  # fmt: skip
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"the chat template refuses these messages: {first_line(error)}"
        ) from error
    return list(encoded["input_ids"])


def read_chat_template(tokenizer: Any, file: Path) -> None:
    """Sets the tokenizer's chat template to the content of a Jinja file.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {file} cannot be read: {error}") from error
