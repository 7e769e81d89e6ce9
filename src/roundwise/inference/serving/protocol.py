"""Data types for OpenAI's requests and errors; knows nothing of models or of the network.

An unsupported field that would change the answer is an error, never silently ignored. Parsing stops at
the first error, and lists have limits, so that its work is in proportion to the body at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from roundwise.inference.prompts import Message
from roundwise.inference.serving.api_errors import ApiError

if TYPE_CHECKING:
    from roundwise.inference.sampling import Sampling

#: Most answers of one request: its prompts times n.
MAX_CHOICES = 64
#: Most stop strings of a request.
MAX_STOPS = 16
#: Most messages of a conversation, and parts of a message.
MAX_MESSAGES = 4096
#: Most likely tokens whose log probabilities a request can ask for.
MAX_LOGPROBS = 20
#: Most tools of a request.
MAX_TOOLS = 128
#: Longest text of a client that an error message repeats.
MAX_QUOTED = 100

#: Fields that have no effect on the answer of this server.
IGNORED_FIELDS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
})  # fmt: skip

#: Unsupported field -> values that are accepted because they have no effect.
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "top_logprobs": (0,), "echo": (False,), "best_of": (1,), "suffix": ("",),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (),
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """Limits for requests."""

    context: int
    """Maximum tokens of prompt and answer together."""
    max_tokens: int | None = None
    """Maximum tokens of an answer; None: limited by the context only."""
    max_requests: int = 32
    """Maximum requests that run or wait."""
    max_batch: int = 16
    """Maximum requests that are computed at the same time."""
    max_bytes: int = 2_000_000
    """Maximum size of a request body in bytes."""
    timeout: float = 600.0
    """Maximum seconds for a request, waiting included."""


class StreamOptions(BaseModel):
    """The field `stream_options`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


def _refuse(message: str) -> PydanticCustomError:
    # Not as the template itself: a client's text may have braces.
    return PydanticCustomError("refused", "{message}", {"message": message})


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Request(BaseModel):
    """Fields that text and chat completions share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[str], Field(max_length=MAX_STOPS), BeforeValidator(_one_or_many)] = []
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None: the client sets no limit."""
        return self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """Number of most likely tokens to return with each token; None: no log probabilities."""
        raise NotImplementedError

    def sampling(self, max_new_tokens: int, model: Any, choice: int) -> Sampling:
        """Returns the sampling parameters of one answer.

        Defaults are the model's (generation_config.json), then OpenAI's.

        Args:
            max_new_tokens: most tokens to generate.
            model: transformers causal language model.
            choice: number of the answer, from 0; each has another seed.
        """
        from roundwise.inference.sampling import Sampling  # late: requests are parsed without torch

        defaults = model.generation_config
        samples = defaults.do_sample and defaults.temperature is not None
        temperature = defaults.temperature if samples else 1.0
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            stop=tuple(self.stop),
            logprobs=self.logprob_count,
        )


R = TypeVar("R", bound=Request)


def _check_prompts(value: Any) -> list[str | list[int]]:
    """Returns the prompts of the field `prompt`, one or several, as texts or token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise _refuse("must be a text, a list of token ids, or a list of such")
    if isinstance(value[0], int):
        return [_check_token_ids(value)]
    if len(value) > MAX_CHOICES:
        raise _refuse(f"has {len(value)} prompts: a request can ask for 1 to {MAX_CHOICES} answers")
    if isinstance(value[0], str):
        if not all(isinstance(prompt, str) for prompt in value):
            raise _refuse("must be a list of texts only, or of token ids only")
        return value
    return [_check_token_ids(prompt) for prompt in value]


def _check_token_ids(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise _refuse("must be a text, a list of token ids, or a list of such")
    if set(map(type, value)) - {int}:
        wrong = next(i for i, token in enumerate(value) if type(token) is not int)
        raise _refuse(f"entry {wrong} of a list of token ids is not an integer")
    return value


class CompletionRequest(Request):
    """Body of POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_check_prompts)]
    """Prompts, as texts or token ids; never empty."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """0: only the prompt is returned, with `echo`."""
    logprobs: Annotated[int, Field(ge=1, le=MAX_LOGPROBS)] | None = None
    echo: bool = False

    @property
    def logprob_count(self) -> int | None:
        """Number of most likely tokens to return with each token; None: no log probabilities."""
        return self.logprobs

    @model_validator(mode="after")
    def _check_echo(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise _refuse("max_tokens: 0 needs echo")
        return self


def _join_parts(value: Any) -> Any:
    """Returns the text of a message whose content is a list of parts; only text is supported."""
    if not isinstance(value, list):
        return value
    if len(value) > MAX_MESSAGES:
        raise _refuse(f"has {len(value)} parts, more than {MAX_MESSAGES}")
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            name = kind[:MAX_QUOTED] if isinstance(kind, str) else "such a part"
            raise _refuse(f"part {number}: {name} is not supported by this server, only text")
        text = part.get("text")
        if not isinstance(text, str) or part.keys() != {"type", "text"}:
            raise _refuse(f"part {number} must have a field text, and no other")
        texts.append(text)
    return "".join(texts)


class ChatMessage(BaseModel):
    """A message of a chat; other fields than role and content are passed to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: Annotated[str | None, BeforeValidator(_join_parts)] = None

    def as_dict(self) -> Message:
        """Returns the message as chat templates take it; arguments of tool calls are objects there."""
        extra = dict(self.model_extra or {})
        if isinstance(calls := extra.get("tool_calls"), list):
            extra["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
        return {**extra, "role": self.role, "content": self.content or ""}


def _with_parsed_arguments(call: Any) -> Any:
    """Returns a tool call of an earlier message whose arguments are parsed, if they are JSON."""
    try:
        function = call["function"]
        return {**call, "function": {**function, "arguments": from_json(function["arguments"])}}
    except (KeyError, TypeError, ValueError):
        return call


class Function(BaseModel):
    """The function of a tool; other fields than its name are for the chat template."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: Annotated[str, Field(min_length=1)]
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool that the model may call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: Function


class ChatRequest(Request):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = []
    tool_choice: Literal["none", "auto"] = "auto"

    @property
    def usable_tools(self) -> list[dict[str, Any]]:
        """Tools that the model may call, as chat templates take them."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_unset=True) for tool in self.tools]

    @property
    def logprob_count(self) -> int | None:
        """Number of most likely tokens to return with each token; None: no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise _refuse("top_logprobs needs logprobs: true")
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate, by the field's newer or older name; None: no limit."""
        return self.max_completion_tokens or self.max_tokens


def parse(body: bytes, kind: type[R]) -> R:
    """Parses the body of a request.

    Args:
        body: JSON.
        kind: class of the request.

    Raises:
        ApiError: not a JSON object, or a field that is missing, wrong, unknown or unsupported.
    """
    try:
        value = from_json(body)
    except ValueError:
        raise ApiError(400, "the body is not valid JSON") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    fields = {k: v for k, v in value.items() if v is not None and k not in IGNORED_FIELDS}
    for name in UNSUPPORTED_FIELDS.keys() & fields.keys() - kind.model_fields.keys():
        if not _has_no_effect(name, fields.pop(name)):
            raise ApiError(400, f"{name} is not supported by this server", param=name)
    unknown = next((name for name in fields if name not in kind.model_fields), None)
    if unknown is not None:
        name = unknown[:MAX_QUOTED]
        raise ApiError(400, f"{name} is not a field of this request", param=name)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _as_api_error(error) from None


def _has_no_effect(name: str, value: Any) -> bool:
    """Tells whether a value of an unsupported field changes nothing; 0 is not False here."""
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in UNSUPPORTED_FIELDS[name]
    )


def _as_api_error(error: ValidationError) -> ApiError:
    """Returns the first of pydantic's errors as an ApiError."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing", param=where)
    return ApiError(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None)
