"""The JSON of responses: token counts, and chunks of a stream that add up to the whole."""

from __future__ import annotations

from typing import Any

import pytest

from roundwise.inference.generation import Generated
from roundwise.inference.sampling import TokenLogprobs
from roundwise.inference.serving.responses import Choice, Piece, ResponseFormat, usage
from roundwise.inference.serving.tool_calls import Message


def generated(text: str, tokens: int, finish: Any = "stop") -> Generated:
    return Generated(text, 4, tokens, finish, 0.1, 0.2)


def choice_of(answer: Generated) -> Choice:
    return Choice((Piece(answer.text),), answer)


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
    whole = form.response([choice_of(answer)], counts)
    [choice] = whole["choices"]
    assert choice["finish_reason"] == "length"  # the time limit, to a client
    chunks = [form.first_chunk(0), form.piece_chunk(0, Piece("a")), form.piece_chunk(0, Piece("b")),
              form.last_chunk(0, choice_of(answer)), form.usage_chunk(counts)]  # fmt: skip
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


FIRST = TokenLogprobs("ab", None)
SECOND = TokenLogprobs("c", -1.5, (("d", -0.5), ("c", -1.5)))
THIRD = TokenLogprobs("\N{REPLACEMENT CHARACTER}", -3.0, (("e", -0.1), ("f", -2.0)))


def test_log_probabilities_of_a_completion() -> None:
    form = ResponseFormat(chat=False, model="m", identity="1")
    answer = Choice((Piece("ab", (FIRST,)), Piece("c?", (SECOND, THIRD))), generated("c?", 2))
    [choice] = form.response([answer], usage([answer.generated], 1))["choices"]
    assert choice["text"] == "abc?"
    assert choice["logprobs"] == {
        "tokens": ["ab", "c", "\N{REPLACEMENT CHARACTER}"],
        "token_logprobs": [None, -1.5, -3.0],
        "top_logprobs": [
            None, {"d": -0.5, "c": -1.5}, {"e": -0.1, "f": -2.0, "\N{REPLACEMENT CHARACTER}": -3.0}
        ],
        "text_offset": [0, 2, 3],
    }  # fmt: skip


def test_log_probabilities_in_chunks_are_those_of_the_whole() -> None:
    whole, streamed = (ResponseFormat(chat=False, model="m", identity="1") for _ in range(2))
    pieces = (Piece("ab", (FIRST,)), Piece("c?", (SECOND, THIRD)))
    answer = Choice(pieces, generated("c?", 2))
    [expected] = whole.response([answer], usage([answer.generated], 1))["choices"]
    chunks = [streamed.piece_chunk(0, piece)["choices"][0]["logprobs"] for piece in pieces]
    for name, values in expected["logprobs"].items():
        assert [value for chunk in chunks for value in chunk[name]] == values
    assert streamed.last_chunk(0, answer)["choices"][0]["logprobs"] is None


def test_equal_texts_of_tokens_keep_the_most_likely() -> None:
    form = ResponseFormat(chat=False, model="m", identity="1")
    entry = TokenLogprobs("x", -4.0, (("x", -0.5), ("y", -1.0)))
    chunk = form.piece_chunk(0, Piece("x", (entry,)))
    assert chunk["choices"][0]["logprobs"]["top_logprobs"] == [{"x": -0.5, "y": -1.0}]


def test_log_probabilities_of_a_chat() -> None:
    form = ResponseFormat(chat=True, model="m", identity="1")
    chunk = form.piece_chunk(0, Piece("c?", (SECOND, THIRD)))
    entries = chunk["choices"][0]["logprobs"]["content"]
    assert entries[0] == {
        "token": "c", "logprob": -1.5, "bytes": [99], "top_logprobs": [
            {"token": "d", "logprob": -0.5, "bytes": [100]},
            {"token": "c", "logprob": -1.5, "bytes": [99]},
        ],
    }  # fmt: skip
    assert entries[1]["bytes"] is None  # a part of a character


def test_tool_calls_of_a_chat() -> None:
    form = ResponseFormat(chat=True, model="m", identity="1")
    message = Message("", "I think", (("f", '{"a": 1}'), ("g", "{}")))
    answer = Choice((Piece("<tool_call>"),), generated("<tool_call>", 9), message)
    [choice] = form.response([answer], usage([answer.generated], 1))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "I think"
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "f", "arguments": '{"a": 1}'}, {"name": "g", "arguments": "{}"}
    ]  # fmt: skip
    assert len({call["id"] for call in calls}) == 2
    delta = form.message_chunk(0, answer)["choices"][0]["delta"]
    assert [call["function"]["name"] for call in delta["tool_calls"]] == ["f", "g"]
    assert form.last_chunk(0, answer)["choices"][0]["finish_reason"] == "tool_calls"
    cut = Choice((), generated("", 9, "length"), message)
    assert form.last_chunk(0, cut)["choices"][0]["finish_reason"] == "length"
