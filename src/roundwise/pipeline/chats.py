"""Chats as tokens, and which of them the assistant wrote."""

from __future__ import annotations

from typing import Any

from roundwise.errors import CalibrationError

#: Tokens by which a chat and its beginning may differ where one ends in the other: a tokenizer merges
#: letters across that place.
MERGED = 4


def assistant_tokens(chat: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """A chat's tokens, and True for those of the assistant's turns.

    A template that marks them (`{% generation %}`) is believed. Otherwise the chat up to a turn is
    rendered with and without it: what is added is the turn, its closing marks included.

    Raises:
        CalibrationError: the template renders a turn otherwise once others follow, so that its place
            cannot be told.
    """
    if "generation %}" in str(tokenizer.chat_template).replace("-%}", "%}"):
        encoded = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    tokens = _rendered(chat, tokenizer)
    counted = [False] * len(tokens)
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        prompt = chat[:turn]
        before = _rendered(prompt, tokenizer, add_generation_prompt=True) if prompt else []
        after = _rendered(chat[: turn + 1], tokenizer)
        start, end = _common(before, tokens), _common(after, tokens)
        if max(len(before) - start, len(after) - end) > MERGED:
            raise CalibrationError(
                f"where turn {turn + 1} of a chat begins and ends cannot be told: the model's template "
                "renders it otherwise once others follow; split such chats after each answer, or do "
                "without --only"
            )
        counted[start:end] = [True] * (end - start)
    return tokens, counted


def _rendered(chat: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[int]:
    encoded = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **options)
    return list(encoded["input_ids"])


def _common(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))
