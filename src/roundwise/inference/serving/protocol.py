"""Data types for OpenAI's requests, responses and errors; knows nothing of models or of the network.

An unsupported field that would change the answer is an error, never silently ignored.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from roundwise.inference.generation import Generated, Sampling
from roundwise.inference.prompts import Message

#: Most answers of one request: its prompts times n.
MAX_CHOICES = 64

#: Fields that have no effect on the answer of this server.
IGNORED_FIELDS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
})  # fmt: skip

#: Unsupported field -> values that are accepted because they have no effect.
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "best_of": (1,), "suffix": ("",),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (),
}  # fmt: skip


class ApiError(Exception):
    """Error that is sent to the client as OpenAI's error object.

    Args:
        status: HTTP status.
        message: one sentence for the client.
        kind: OpenAI's error type.
        param: name of the field that is wrong.
        code: OpenAI's error code.
    """

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
    """The field `stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Request(BaseModel):
    """Fields that text and chat completions share."""

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
    def token_limit(self) -> int | None:
        """Most tokens to generate; None: the client sets no limit."""
        return self.max_tokens

    def sampling(self, max_new_tokens: int, model: Any, choice: int) -> Sampling:
        """Returns the sampling parameters of one answer.

        Defaults are the model's (generation_config.json), then OpenAI's.

        Args:
            max_new_tokens: most tokens to generate.
            model: transformers causal language model.
            choice: number of the answer, from 0; each has another seed.
        """
        defaults = model.generation_config
        samples = defaults.do_sample and defaults.temperature is not None
        temperature = defaults.temperature if samples else 1.0
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            stop=tuple(stop),
        )


R = TypeVar("R", bound=Request)


class CompletionRequest(Request):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]

    def prompts(self) -> list[str | list[int]]:
        """Returns the prompts, one or several, as texts or token ids."""
        if isinstance(self.prompt, str) or all(isinstance(x, int) for x in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(BaseModel):
    """A part of a message; only text is supported."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a chat; other fields than role and content are passed to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[TextPart] | None = None

    def as_dict(self) -> Message:
        """Returns the message with its parts joined, as chat templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": text}


class ChatRequest(Request):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate, by the field's newer or older name; None: no limit."""
        return self.max_completion_tokens or self.max_tokens


def parse_request(body: bytes, kind: type[R]) -> R:
    """Parses the body of a request.

    Args:
        body: JSON.
        kind: class of the request.

    Raises:
        ApiError: not a JSON object, or a field that is missing, wrong, unknown or unsupported.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    fields = {k: v for k, v in value.items() if v is not None and k not in IGNORED_FIELDS}
    for name in fields.keys() & UNSUPPORTED_FIELDS.keys():
        if fields.pop(name) not in UNSUPPORTED_FIELDS[name]:
            raise ApiError(400, f"{name} is not supported by this server", param=name)
    try:
        return kind.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise _as_api_error(error) from None


def _as_api_error(error: ValidationError) -> ApiError:
    """Returns the first of pydantic's errors as an ApiError."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{where} is not a field of this request", param=where)
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing", param=where)
    return ApiError(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None)


def usage(answers: list[Generated], prompts: int) -> dict[str, int]:
    """Returns token counts as OpenAI's `usage`; a prompt with several answers counts once.

    Args:
        answers: answers to all prompts, in order, the same number for each.
        prompts: number of prompts.
    """
    answers_per_prompt = len(answers) // prompts
    prompt = sum(answer.prompt_tokens for answer in answers[::answers_per_prompt])
    completion = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


class ResponseFormat:
    """Builds the JSON of a response, whole or as chunks of a stream.

    Args:
        chat: True for chat completions, False for text completions.
        model: name of the model.
        identity: unique part of the response's id.
    """

    def __init__(self, *, chat: bool, model: str, identity: str) -> None:
        self._chat = chat
        self._header = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{identity}",
            "created": int(time.time()),
            "model": model,
        }

    def response(self, answers: list[Generated], usage: dict[str, int]) -> dict[str, Any]:
        """Returns the whole response, for a request without `stream`."""
        choices = [
            {
                "index": index,
                "logprobs": None,
                "finish_reason": _finish_reason(answer),
                **(
                    {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
                    if self._chat
                    else {"text": answer.text}
                ),
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._with_object(""), "choices": choices, "usage": usage}

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """Returns the chunk that starts answer `index` of a chat; None for text completions."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk(index, {"delta": delta}, None) if self._chat else None

    def text_chunk(self, index: int, text: str) -> dict[str, Any]:
        """Returns a chunk with a piece of text."""
        return self._chunk(
            index, {"delta": {"content": text}} if self._chat else {"text": text}, None
        )

    def last_chunk(self, index: int, answer: Generated) -> dict[str, Any]:
        """Returns the chunk that ends an answer, with its finish_reason."""
        content: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        return self._chunk(index, content, _finish_reason(answer))

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """Returns the last chunk of a stream, for clients that asked for usage."""
        return {**self._with_object(".chunk"), "choices": [], "usage": usage}

    def _chunk(self, index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        return {**self._with_object(".chunk"), "choices": [choice]}

    def _with_object(self, suffix: str) -> dict[str, Any]:
        return {
            **self._header,
            "object": f"chat.completion{suffix}" if self._chat else "text_completion",
        }


def _finish_reason(answer: Generated) -> str:
    """Returns OpenAI's finish_reason; an answer that the time limit ended counts as too long."""
    return "stop" if answer.finish == "stop" else "length"
