"""Requests: which are accepted, and how others are refused; and the JSON of responses."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundwise.inference.generation import Generated
from roundwise.inference.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Request,
    ResponseFormat,
    parse_request,
    usage,
)

TEXT = {"model": "m", "prompt": "p"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def parsed(fields: dict[str, Any], base: dict[str, Any] = TEXT) -> Any:
    kind = ChatRequest if base is CHAT else CompletionRequest
    return parse_request(json.dumps({**base, **fields}).encode(), kind)


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
    assert parsed({"max_tokens": 5}).token_limit == 5
    assert parsed({"max_tokens": 5, "max_completion_tokens": 7}, CHAT).token_limit == 7
    assert parsed({}, CHAT).token_limit is None


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": None},
        {"echo": False, "best_of": 1, "suffix": None, "temperature": None},
    ],
)
def test_fields_without_effect_are_accepted(fields: dict[str, Any]) -> None:
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
def test_refused(fields: dict[str, Any], message: str, param: str | None) -> None:
    with pytest.raises(ApiError) as raised:
        parsed(fields)
    error = raised.value.body["error"]
    assert raised.value.status == 400
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
def test_refused_in_chats(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message.replace(".", r"\.")):
        parsed(fields, CHAT)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
def test_not_a_json_object(body: bytes) -> None:
    with pytest.raises(ApiError, match="the body is not"):
        parse_request(body, CompletionRequest)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields})),
    st.sampled_from([CompletionRequest, ChatRequest]),
)
def test_any_value_is_accepted_or_refused(value: Any, field: str, kind: type[Request]) -> None:
    base = CHAT if kind is ChatRequest else TEXT
    try:
        parse_request(json.dumps({**base, field: value}).encode(), kind)
    except ApiError as error:
        assert error.status == 400


def test_sampling_defaults_are_the_models_then_openais() -> None:
    def model(**config: Any) -> Any:
        return SimpleNamespace(
            generation_config=SimpleNamespace(**{"do_sample": False, "temperature": None, **config})
        )

    request = parsed({"stop": "end", "seed": 2**63 - 1})
    sampling = request.sampling(7, model(), choice=1)
    assert (sampling.max_new_tokens, sampling.temperature) == (7, 1.0)
    assert (sampling.stop, sampling.seed) == (("end",), 0)  # seeds wrap around
    own = model(do_sample=True, temperature=0.6)
    assert request.sampling(7, own, 0).temperature == 0.6
    assert request.sampling(7, model(temperature=0.6), 0).temperature == 1.0
    assert parsed({"temperature": 0}).sampling(7, own, 0).temperature == 0


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
