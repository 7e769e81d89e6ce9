"""OpenAI's requests, answers and errors as data; knows nothing of models or of the network.

A field that would change the answer and is not supported is an error, never passed over in silence.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from roundwise.inference.generation import Generated, Sampling
from roundwise.inference.prompts import Message

#: Answers that one request may ask for: its prompts times n.
MAX_CHOICES = 64

#: Fields that change nothing about the answer here.
IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
})  # fmt: skip

#: Fields that are not supported, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "best_of": (1,), "suffix": ("",),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (),
}  # fmt: skip


class ApiError(Exception):
    """What a client is told instead of an answer; its message becomes OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Request(BaseModel):
    """What both kinds of completions share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """The limit the client has set."""
        return self.max_tokens

    def sampling(self, max_new_tokens: int, model: Any, choice: int) -> Sampling:
        """For the answer number `choice`; what is not said is the model's own, then OpenAI's."""
        own = model.generation_config
        usual = own.temperature if own.do_sample and own.temperature is not None else 1.0
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_new_tokens,
            usual if self.temperature is None else self.temperature,
            self.top_p,
            self.top_k,
            self.min_p,
            self.repetition_penalty,
            None if self.seed is None else (self.seed + choice) % 2**63,
            tuple(stop),
        )


R = TypeVar("R", bound=Request)


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]

    def prompts(self) -> list[str | list[int]]:
        """One or many, texts or token ids."""
        if isinstance(self.prompt, str) or all(isinstance(x, int) for x in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class Part(BaseModel):
    """A part of a message; only text is understood."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message; fields beyond role and content are the template's matter."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[Part] | None = None

    def as_dict(self) -> Message:
        """With its parts joined, as templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": text}


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """The limit the client has set, by the newer name or the older."""
        return self.max_completion_tokens or self.max_tokens


def parse(body: bytes, kind: type[R]) -> R:
    """Reads a request.

    Raises:
        ApiError: no JSON, a field that is missing, wrong, unknown or not supported.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    given = {k: v for k, v in value.items() if v is not None and k not in IGNORED}
    for name in given.keys() & NEUTRAL.keys():
        if given.pop(name) not in NEUTRAL[name]:
            raise ApiError(400, f"{name} is not supported by this server", param=name)
    try:
        return kind.model_validate_json(json.dumps(given))
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    """The first thing that is wrong, as OpenAI would name it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{where} is not a field of this request", param=where)
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing", param=where)
    return ApiError(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None)


def usage(answers: list[Generated], prompts: int) -> dict[str, int]:
    """Token counts; a prompt with several answers counts once, as at OpenAI."""
    each = len(answers) // prompts
    prompt = sum(answer.prompt_tokens for answer in answers[::each])
    completion = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


class Shape:
    """The JSON of one answer, whole or in pieces."""

    def __init__(self, *, chat: bool, model: str, identity: str) -> None:
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{identity}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: list[Generated], counts: dict[str, int]) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        choices = [
            {
                "index": index,
                "logprobs": None,
                "finish_reason": _reason(answer),
                **(
                    {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
                    if self._chat
                    else {"text": answer.text}
                ),
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._kind(""), "choices": choices, "usage": counts}

    def begin(self, index: int) -> dict[str, Any] | None:
        """What a chat answer starts with."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk(index, {"delta": delta}, None) if self._chat else None

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Some more text."""
        return self._chunk(
            index, {"delta": {"content": text}} if self._chat else {"text": text}, None
        )

    def end(self, index: int, answer: Generated) -> dict[str, Any]:
        """Why one answer has ended."""
        return self._chunk(index, {"delta": {}} if self._chat else {"text": ""}, _reason(answer))

    def counts(self, counts: dict[str, int]) -> dict[str, Any]:
        """The last piece, for those who ask for usage."""
        return {**self._kind(".chunk"), "choices": [], "usage": counts}

    def _chunk(self, index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        return {**self._kind(".chunk"), "choices": [choice]}

    def _kind(self, suffix: str) -> dict[str, Any]:
        return {
            **self._head,
            "object": f"chat.completion{suffix}" if self._chat else "text_completion",
        }


def _reason(answer: Generated) -> str:
    """An answer that was cut off by the time limit is too long for this server."""
    return "stop" if answer.finish == "stop" else "length"
