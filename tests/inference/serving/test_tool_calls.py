"""Tool calls: rendered by the chat template, and found in answers of models that transformers knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from roundwise.inference.serving.api_errors import ApiError
from roundwise.inference.serving.encoder import Encoder
from roundwise.inference.serving.protocol import ChatRequest, Limits
from roundwise.inference.serving.tool_calls import Message, parse_message, response_template

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]
#: In the style of Qwen's.
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    loaded = transformers.AutoTokenizer.from_pretrained(tiny)
    loaded.chat_template = TEMPLATE
    return loaded


def encode(tokenizer: Any, template: Any, **fields: Any) -> str:
    """The prompt of a request with tools."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, **fields}
    encoder = Encoder(tokenizer, "m", 4096, Limits(context=512), template)
    _, [ids] = encoder.encode(json.dumps(body).encode(), ChatRequest)
    return str(tokenizer.decode(ids))


def parsed(tokenizer: Any, answer: str, template: Any = None) -> Message:
    template = template or response_template(tokenizer, "qwen3")
    prompt = tokenizer("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return parse_message(tokenizer, template, prompt, ids, TOOLS)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_tools_are_rendered(tokenizer: Any) -> None:
    template = response_template(tokenizer, "qwen3")
    assert encode(tokenizer, template).startswith("weather <|im_start|>user")
    assert encode(tokenizer, template, tool_choice="none").startswith("<|im_start|>user")


def test_a_model_whose_tool_calls_nobody_knows(tokenizer: Any) -> None:
    assert response_template(tokenizer, "llama") is None
    with pytest.raises(ApiError, match="transformers does not know how it writes tool calls") as e:
        encode(tokenizer, None)
    assert e.value.body["error"]["param"] == "tools"
    assert encode(tokenizer, None, tool_choice="none")


def test_a_template_without_tools(tokenizer: Any) -> None:
    template = response_template(tokenizer, "qwen3")
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ApiError, match="chat template has no tools"):
        encode(tokenizer, template)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Hello!<|im_end|>", Message("Hello!")),
        (call("weather", city="Rome", days=3), Message("", None, (
            ("weather", '{"city": "Rome", "days": 3}'),))),
        (f"I look.\n{call('weather', city='a')}\n{call('weather', city='b')}<|im_end|>", Message(
            "I look.", None, (("weather", '{"city": "a"}'), ("weather", '{"city": "b"}')))),
        ("<think>hm</think>Yes", Message("Yes", "hm")),
    ],
)  # fmt: skip
def test_answers_become_parts(answer: str, expected: Message, tokenizer: Any) -> None:
    assert parsed(tokenizer, answer) == expected


def test_the_description_of_the_tokenizer_comes_first(tokenizer: Any) -> None:
    own = {
        "start_anchor": "assistant\n",
        "fields": {
            "tool_calls": {
                "open": "CALL ", "close": ";", "repeats": True, "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": "END", "content": "text"},
        },
    }  # fmt: skip
    tokenizer.response_template = own
    assert response_template(tokenizer, "qwen3") == own
    answer = 'CALL {"name": "weather", "arguments": {}};'
    assert parsed(tokenizer, answer, own).tool_calls == (("weather", "{}"),)


def test_a_damaged_call_is_content(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(
        tokenizer, "m", 4096, Limits(context=512), response_template(tokenizer, "qwen3")
    )
    request = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user"}], "tools": TOOLS}
    )
    text = "<tool_call>\n{not JSON\n</tool_call>"
    assert encoder.parse_message([5], tokenizer(text)["input_ids"], request) == Message(text)
    assert "an answer cannot be parsed" in caplog.text
