"""Requests: what is understood, and how the rest is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundwise.inference.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Request,
    parse,
)

TEXT = {"model": "m", "prompt": "p"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def parsed(fields: dict[str, Any], base: dict[str, Any] = TEXT) -> Any:
    kind = ChatRequest if base is CHAT else CompletionRequest
    return parse(json.dumps({**base, **fields}).encode(), kind)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompts(prompt: Any, expected: list[Any]) -> None:
    assert parsed({"prompt": prompt}).prompts() == expected


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parsed(
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "name": "x"}]}, CHAT
    )
    assert [message.as_dict() for message in request.messages] == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "name": "x", "content": ""},
    ]


def test_both_names_of_the_limit() -> None:
    assert parsed({"max_tokens": 5}).wanted_tokens == 5
    assert parsed({"max_tokens": 5, "max_completion_tokens": 7}, CHAT).wanted_tokens == 7
    assert parsed({}, CHAT).wanted_tokens is None


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": None},
        {"echo": False, "best_of": 1, "suffix": None, "temperature": None},
    ],
)
def test_what_asks_for_nothing_is_taken(fields: dict[str, Any]) -> None:
    parsed(fields)


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"logprobs": 3}, "logprobs is not supported", "logprobs"),
        ({"echo": True}, "echo is not supported", "echo"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported", "frequency_penalty"),
        ({"top_kk": 3}, "top_kk is not a field of this request", "top_kk"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater", "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens: Input should be a valid integer", "max_tokens"),
        ({"max_tokens": 1e400}, "max_tokens: Input should be", "max_tokens"),
        ({"temperature": 2.1}, "temperature: Input should be less", "temperature"),
        ({"temperature": float("nan")}, "temperature: Input should be", "temperature"),
        ({"top_p": 0}, "top_p: Input should be greater", "top_p"),
        ({"n": 1000}, "n: Input should be less", "n"),
        ({"seed": 2**64}, "seed: Input should be", "seed"),
        ({"prompt": None}, "prompt is missing", "prompt"),
        ({"prompt": [1, "a"]}, "prompt", None),
        ({"prompt": "\ud800"}, "Invalid JSON", None),
        ({"stop": ["x"] * 17}, "stop", None),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str, param: str | None) -> None:
    with pytest.raises(ApiError) as found:
        parsed(fields)
    error = found.value.body["error"]
    assert found.value.status == 400
    assert error["message"].startswith(message)
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages.0.role is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ],
)
def test_what_is_refused_in_chats(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message.replace(".", r"\.")):
        parsed(fields, CHAT)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object(body: bytes) -> None:
    with pytest.raises(ApiError, match="the body is not"):
        parse(body, CompletionRequest)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields})),
    st.sampled_from([CompletionRequest, ChatRequest]),
)
def test_any_value_is_taken_or_refused(value: Any, field: str, kind: type[Request]) -> None:
    base = CHAT if kind is ChatRequest else TEXT
    try:
        parse(json.dumps({**base, field: value}).encode(), kind)
    except ApiError as error:
        assert error.status == 400
