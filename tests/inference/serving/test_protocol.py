"""Requests: which are accepted, and how others are refused; and the JSON of responses."""

from __future__ import annotations

import json
import time
import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundwise.inference.serving.api_errors import ApiError
from roundwise.inference.serving.protocol import ChatRequest, CompletionRequest, Request, parse

TEXT = {"model": "m", "prompt": "p"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"a": 1}}}
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
    assert parsed({"prompt": prompt}).prompt == expected


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parsed(
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "name": "x"}]}, CHAT
    )
    assert [message.as_dict() for message in request.messages] == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "name": "x", "content": ""},
    ]


def test_tools_are_what_templates_take() -> None:
    assert parsed({"tools": [TOOL]}, CHAT).usable_tools == [TOOL]
    assert parsed({"tools": [TOOL], "tool_choice": "none"}, CHAT).usable_tools == []
    assert parsed({"tools": []}, CHAT).usable_tools == []


def test_arguments_of_earlier_tool_calls_are_objects_for_templates() -> None:
    def call(arguments: Any) -> dict[str, Any]:
        return {"type": "function", "id": "1", "function": {"name": "f", "arguments": arguments}}

    calls = [call('{"a": [1]}'), call("no JSON"), call({"a": 2}), "no call"]
    request = parsed({"messages": [{"role": "assistant", "tool_calls": calls}]}, CHAT)
    assert request.messages[0].as_dict() == {
        "role": "assistant", "content": "",
        "tool_calls": [call({"a": [1]}), call("no JSON"), call({"a": 2}), "no call"],
    }  # fmt: skip


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
        ({"logprobs": 21}, "logprobs: Input should be less", "logprobs"),
        ({"logprobs": True}, "logprobs: Input should be a valid integer", "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs is not supported", "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens: 0 needs echo", None),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported", "frequency_penalty"),
        ({"top_kk": 3}, "top_kk is not a field of this request", "top_kk"),
        ({"max_tokens": -1}, "max_tokens: Input should be greater", "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens: Input should be a valid integer", "max_tokens"),
        ({"max_tokens": 1e400}, "max_tokens: Input should be", "max_tokens"),
        ({"temperature": 2.1}, "temperature: Input should be less", "temperature"),
        ({"temperature": float("nan")}, "temperature: Input should be", "temperature"),
        ({"top_p": 0}, "top_p: Input should be greater", "top_p"),
        ({"n": 1000}, "n: Input should be less", "n"),
        ({"seed": 2**64}, "seed: Input should be", "seed"),
        ({"prompt": None}, "prompt is missing", "prompt"),
        ({"prompt": [1, "a"]}, "prompt", None),
        ({"prompt": "\ud800"}, "the body is not valid JSON", None),
        ({"prompt": []}, "prompt: must be a text, a list of token ids", "prompt"),
        ({"prompt": [["a"]]}, "prompt: entry 0 of a list of token ids is not an integer", "prompt"),
        ({"prompt": [1, True]}, "prompt: entry 1 of a list", "prompt"),
        ({"prompt": ["a", [1]]}, "prompt: must be a list of texts only", "prompt"),
        ({"prompt": [[1], "a"]}, "prompt: must be a text, a list of token ids", "prompt"),
        ({"prompt": ["a"] * 65}, "prompt: has 65 prompts: a request can ask for 1 to 64", "prompt"),
        ({"prompt": {"a": 1}}, "prompt: must be a text, a list of token ids", "prompt"),
        ({"logprobs": 0}, "logprobs: Input should be greater than or equal to 1", "logprobs"),
        ({"frequency_penalty": False}, "frequency_penalty is not supported", "frequency_penalty"),
        ({"stop": ["x"] * 17}, "stop: List should have at most 16 items", "stop"),
        ({"stop": [1]}, "stop.0: Input should be a valid string", "stop.0"),
        ({"stop": {"a": 1}}, "stop: Input should be a valid list", "stop"),
        ({"top_k": 2**40}, "top_k: Input should be less", "top_k"),
        ({"stream_options": {"chunks": 3}}, "stream_options.chunks: Extra inputs", None),
        ({"x" * 9000: 1}, "x" * 100 + " is not a field", "x" * 100),
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
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content: part 0: image_url is not supported",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "file"}]}
                ]
            },
            "messages.0.content: part 1: file is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio{0}"}]}]},
            "input_audio.0.",
        ),
        ({"messages": [{"role": "user", "content": ["text"]}]}, "part 0: such a part is not"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "part 0 must have a field",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content: Input should be"),
        ({"messages": [{"role": "user"}] * 4097}, "messages: List should have at most 4096 items"),
        ({"messages": "hello"}, "messages: Input should be a valid list"),
        ({**CHAT, "top_logprobs": 3}, "top_logprobs needs logprobs: true"),
        ({**CHAT, "logprobs": 3}, "logprobs: Input should be a valid boolean"),
        ({**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs: Input should be less"),
        ({**CHAT, "echo": True}, "echo is not supported"),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools.0.function is missing"),
        ({**CHAT, "tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools.0.type: Input"),
        (
            {**CHAT, "tools": [{"type": "function", "function": {"name": ""}}]},
            "tools.0.function.name",
        ),
        ({**CHAT, "tools": [TOOL] * 129}, "tools: List should have at most 128 items"),
        (
            {**CHAT, "tools": [TOOL], "tool_choice": "required"},
            "tool_choice: Input should be 'none'",
        ),
        ({**CHAT, "tool_choice": {"type": "function"}}, "tool_choice: Input should be 'none'"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ],
)
def test_refused_in_chats(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message):
        parsed(fields, CHAT)


def test_log_probabilities() -> None:
    assert parsed({}).logprob_count is None
    assert parsed({"logprobs": 5, "echo": True, "max_tokens": 0}).logprob_count == 5
    assert parsed({}, CHAT).logprob_count is None
    assert parsed({"logprobs": True}, CHAT).logprob_count == 0
    assert parsed({"logprobs": True, "top_logprobs": 2}, CHAT).logprob_count == 2
    assert parsed({"logprobs": False, "top_logprobs": 0}, CHAT).logprob_count is None


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
def test_not_a_json_object(body: bytes) -> None:
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
def test_any_value_is_accepted_or_refused(value: Any, field: str, kind: type[Request]) -> None:
    base = CHAT if kind is ChatRequest else TEXT
    try:
        parse(json.dumps({**base, field: value}).encode(), kind)
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


#: Bodies of two megabytes, each of which once took seconds or gigabytes, with the field that is wrong.
LARGE: dict[str, tuple[str, type[Request], str]] = {
    "a list of token ids that ends with a text": (
        '{"model":"m","prompt":[' + "1," * 900_000 + '"a"]}', CompletionRequest, "prompt"),
    "token ids in lists": (
        '{"model":"m","prompt":[[' + "],[".join(["1"] * 450_000) + "]]}", CompletionRequest, "prompt"),
    "texts": ('{"model":"m","prompt":[' + '"a",' * 450_000 + "1]}", CompletionRequest, "prompt"),
    "numbers with fractions": (
        '{"model":"m","prompt":[' + "1.5," * 450_000 + "1]}", CompletionRequest, "prompt"),
    "stop strings": (
        '{"model":"m","prompt":"a","stop":[' + "1," * 900_000 + "1]}", CompletionRequest, "stop"),
    "fields": (
        "{" + ",".join(f'"{i}":1' for i in range(190_000)) + "}", CompletionRequest, "0"),
    "messages": (
        '{"model":"m","messages":[' + "{}," * 600_000 + "{}]}", ChatRequest, "messages"),
    "parts": (
        '{"model":"m","messages":[{"role":"user","content":[' + "{}," * 600_000 + "{}]}]}",
        ChatRequest, "messages.0.content"),
    "nested lists": ('{"model":"m","prompt":' + "[" * 900_000, CompletionRequest, ""),
    "a name": ('{"model":["' + "a" * 1_900_000 + '"],"prompt":"a"}', CompletionRequest, "model"),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_a_large_body_is_refused_quickly_with_a_short_message(name: str) -> None:
    body, kind, param = LARGE[name]
    begun = time.process_time()
    tracemalloc.start()
    with pytest.raises(ApiError) as raised:
        parse(body.encode(), kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - begun < 5  # tracing makes it ten times as slow
    assert peak < 200 * len(body)
    error = raised.value.body["error"]
    assert (error["param"] or "") == param
    assert len(error["message"]) < 300
