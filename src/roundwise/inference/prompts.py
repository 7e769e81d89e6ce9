"""From a text or a conversation to the token ids that a model goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from roundwise.errors import CheckpointError, ConfigError

#: {"role": "user", "content": "..."}, as chat templates take it.
Message = dict[str, Any]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text to go on with, with the special tokens the tokenizer begins with.

    Raises:
        ConfigError: the text is empty, or the tokenizer makes no token of it.
    """
    ids = tokenizer(text, verbose=False)["input_ids"] if text else []
    if not ids:
        raise ConfigError("the prompt is empty: give some text to go on with")
    return list(ids)


def encode_chat(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of a conversation, up to where the answer begins, by the model's chat template.

    Raises:
        CheckpointError: the model has no chat template.
        ConfigError: the template refuses these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(
            "the model has no chat template: use plain completions, or give a template with "
            "--chat-template FILE"
        )
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ConfigError(f"the chat template refuses these messages: {reason}") from error
    return list(encoded["input_ids"])


def read_chat_template(tokenizer: Any, file: Path) -> None:
    """Gives the tokenizer a chat template from a Jinja file.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {file} cannot be read: {error}") from error
