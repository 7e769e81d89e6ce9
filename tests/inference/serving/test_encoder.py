"""Bodies of requests become token ids, or errors that name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from roundwise.inference.serving.api_errors import ApiError
from roundwise.inference.serving.encoder import Encoder
from roundwise.inference.serving.protocol import ChatRequest, CompletionRequest, Limits
from tests.helpers import CHAT_TEMPLATE

CHAT = {"messages": [{"role": "user", "content": "open a file"}]}


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    loaded = transformers.AutoTokenizer.from_pretrained(tiny)
    loaded.chat_template = CHAT_TEMPLATE
    return loaded


def encode(tokenizer: Any, limits: Limits | None = None, **fields: Any) -> list[list[int]]:
    body = {"model": "m", **fields}
    encoder = Encoder(tokenizer, "m", 4096, limits or Limits(context=64))
    kind: Any = ChatRequest if "messages" in body else CompletionRequest
    request, prompts = encoder.encode(json.dumps(body).encode(), kind)
    assert request.model == "m"
    return [list(ids) for ids in prompts]


def refused(tokenizer: Any, **fields: Any) -> dict[str, Any]:
    with pytest.raises(ApiError) as raised:
        encode(tokenizer, **fields)
    return {"status": raised.value.status, **raised.value.body["error"]}


def test_prompts_become_their_tokens(tokenizer: Any) -> None:
    os, sys = (tokenizer(text)["input_ids"] for text in ("import os", "import sys"))
    assert encode(tokenizer, prompt="import os") == [os]
    assert encode(tokenizer, prompt=["import os", "import sys"]) == [os, sys]
    assert encode(tokenizer, prompt=os) == [os]
    assert encode(tokenizer, prompt=[os, sys]) == [os, sys]


def test_a_chat_goes_through_the_template(tokenizer: Any) -> None:
    [ids] = encode(tokenizer, **CHAT)
    assert tokenizer.decode(ids) == "# user: open a file\n# assistant:"


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"prompt": ""}, "the prompt is empty", "prompt"),
        ({"prompt": [4096]}, "token ids must be from 0 to 4095", "prompt"),
        ({"prompt": [[5], [-1]]}, "token ids must be from 0 to 4095", "prompt"),
        ({"prompt": [2**70]}, "token ids must be from 0 to 4095", "prompt"),
        ({"prompt": [[]]}, "token ids must be from 0 to 4095", "prompt"),
        (
            {"prompt": [5] * 64},
            "the model's context is 64 tokens, but a prompt of 64 and 1",
            "prompt",
        ),
        ({"prompt": "a", "max_tokens": 64}, "the model's context is 64 tokens", "prompt"),
        ({"prompt": ["a"] * 33, "n": 2}, "1 to 64 answers", "prompt"),
        ({**CHAT, "max_tokens": 64}, "the model's context is 64 tokens", "messages"),
    ],
)
def test_wrong_prompts_are_named(
    fields: dict[str, Any], message: str, param: str, tokenizer: Any
) -> None:
    error = refused(tokenizer, **fields)
    assert error["status"] == 400
    assert message in error["message"]
    assert error["param"] == param


def test_another_model(tokenizer: Any) -> None:
    error = refused(tokenizer, model="x" * 5000, prompt="a")
    assert (error["status"], error["code"]) == (404, "model_not_found")
    assert len(error["message"]) < 200


def test_the_limit_of_the_server(tokenizer: Any) -> None:
    limits = Limits(context=64, max_tokens=5)
    assert encode(tokenizer, limits, prompt="a", max_tokens=5)
    error = refused(tokenizer, limits=limits, prompt="a", max_tokens=6)
    assert (error["message"], error["param"]) == (
        "max_tokens is at most 5 on this server", "max_tokens"
    )  # fmt: skip


def test_a_model_without_a_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    error = refused(tokenizer, **CHAT)
    assert (error["status"], error["param"]) == (400, "messages")
    assert "the model has no chat template" in error["message"]


def test_a_failure_of_the_tokenizer_is_logged_and_not_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def tokenizer(*_: Any, **__: Any) -> Any:
        raise RuntimeError("already borrowed")

    error = refused(tokenizer, prompt="import os")
    assert (error["status"], error["message"]) == (500, "the model failed: RuntimeError")
    assert "already borrowed" in caplog.text


def test_memory_that_runs_out_is_an_error_of_the_request() -> None:
    def tokenizer(*_: Any, **__: Any) -> Any:
        raise MemoryError

    assert refused(tokenizer, prompt="a")["message"] == "the prompt needs too much memory"
