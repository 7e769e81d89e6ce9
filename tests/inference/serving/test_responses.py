"""The JSON of responses: token counts, and chunks of a stream that add up to the whole."""

from __future__ import annotations

from typing import Any

import pytest

from roundwise.inference.generation import Generated
from roundwise.inference.serving.responses import ResponseFormat, usage


def generated(text: str, tokens: int, finish: Any = "stop") -> Generated:
    return Generated(text, 4, tokens, finish, 0.1, 0.2)


def test_usage_counts_a_prompt_once() -> None:
    answers = [generated("a", 1), generated("b", 2), generated("c", 3), generated("d", 4)]
    assert usage(answers, prompts=2) == {
        "prompt_tokens": 8, "completion_tokens": 10, "total_tokens": 18
    }  # fmt: skip


@pytest.mark.parametrize("chat", [True, False])
def test_chunks_of_a_stream_add_up_to_the_response(chat: bool) -> None:
    form = ResponseFormat(chat=chat, model="m", identity="1")
    answer = generated("ab", 2, "cancelled")
    counts = usage([answer], 1)
    whole = form.response([answer], counts)
    [choice] = whole["choices"]
    assert choice["finish_reason"] == "length"  # the time limit, to a client
    chunks = [form.first_chunk(0), form.text_chunk(0, "a"), form.text_chunk(0, "b"),
              form.last_chunk(0, answer), form.usage_chunk(counts)]  # fmt: skip
    assert (chunks[0] is not None) == chat
    chunks = [chunk for chunk in chunks if chunk is not None]
    assert {chunk["id"] for chunk in chunks} == {whole["id"]}
    parts = [c["choices"][0] for c in chunks[:-1]]
    assert [p["finish_reason"] for p in parts][-2:] == [None, "length"]
    if chat:
        assert whole["object"] == "chat.completion"
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert parts[0]["delta"]["role"] == choice["message"]["role"] == "assistant"
        texts = [p["delta"].get("content", "") for p in parts]
        assert "".join(texts) == choice["message"]["content"] == "ab"
    else:
        assert {chunk["object"] for chunk in [*chunks, whole]} == {"text_completion"}
        assert "".join(p["text"] for p in parts) == choice["text"] == "ab"
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], counts)
