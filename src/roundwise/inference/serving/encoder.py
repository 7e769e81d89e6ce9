"""Turns the body of a request into token ids: parsing, validation, chat template, tokenization.

All work in proportion to what a client sends is here. The server runs it in processes that it can stop
(encoder_process.py), so this module must not import torch: a process must start quickly.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from roundwise.errors import UsageError, first_line
from roundwise.inference.prompts import encode_chat, encode_text
from roundwise.inference.serving.api_errors import ApiError
from roundwise.inference.serving.protocol import (
    MAX_CHOICES,
    MAX_QUOTED,
    ChatRequest,
    CompletionRequest,
    Limits,
    Request,
    parse,
)
from roundwise.inference.serving.tool_calls import Message, parse_message

logger = logging.getLogger("roundwise.serve")

R = TypeVar("R", bound=Request)


class Encoded(NamedTuple, Generic[R]):
    """A request that was checked, and the token ids of its prompts."""

    request: R
    """The request without its prompts or messages."""
    prompts: list[array[int]]


@dataclass(frozen=True)
class Encoder:
    """Checks and encodes requests for one model."""

    tokenizer: Any
    name: str
    """Name of the model for clients."""
    vocabulary: int
    """Number of tokens."""
    limits: Limits
    response_template: dict[str, Any] | None = None
    """Description of the answers of the model, with tool calls; None: not known."""

    def parse_message(self, prompt: list[int], answer: list[int], request: ChatRequest) -> Message:
        """Returns an answer to a request with tools, in its parts; if it has none, all is content."""
        assert self.response_template is not None
        try:
            return parse_message(
                self.tokenizer, self.response_template, prompt, answer, request.usable_tools
            )
        except (
            Exception
        ) as error:  # a text that a model wrote, and expressions that its authors wrote
            logger.warning("an answer cannot be parsed: %s", first_line(error))
            return Message(self.tokenizer.decode(answer, skip_special_tokens=True))

    def encode(self, body: bytes, kind: type[R]) -> Encoded[R]:
        """Returns a checked request.

        Args:
            body: JSON.
            kind: class of the request.

        Raises:
            ApiError: the request is wrong, for another model, or too long; or the tokenizer failed.
        """
        request = parse(body, kind)
        self.check_name(request.model)
        if isinstance(request, ChatRequest):
            messages = [message.as_dict() for message in request.messages]
            tools = request.usable_tools
            if tools and self.response_template is None:
                raise ApiError(
                    400, "tools are not supported for this model: transformers does not know how it "
                    "writes tool calls", param="tools",
                )  # fmt: skip
            prompts = [self._run("messages", lambda: encode_chat(self.tokenizer, messages, tools))]
            request.messages = []
        else:
            assert isinstance(request, CompletionRequest)
            prompts = [self._encode_prompt(prompt) for prompt in request.prompt]
            request.prompt = []
        self._check(prompts, request)
        return Encoded(request, [array("i", ids) for ids in prompts])

    def check_name(self, name: str) -> None:
        """Fails if a client asks for another model.

        Raises:
            ApiError: it names the model of this server.
        """
        if name != self.name:
            raise ApiError(
                404, f"there is no model {name[:MAX_QUOTED]!r}: this server has {self.name!r}",
                param="model", code="model_not_found",
            )  # fmt: skip

    def _encode_prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._run("prompt", lambda: encode_text(self.tokenizer, prompt))
        return prompt

    def _run(self, param: str, work: Callable[[], list[int]]) -> list[int]:
        """Runs the tokenizer, whose errors become the request's."""
        try:
            return work()
        except UsageError as error:
            raise ApiError(400, str(error), param=param) from error
        except MemoryError:
            raise ApiError(400, "the prompt needs too much memory", param=param) from None
        except Exception as error:  # a failure of the tokenizer or the chat template
            raise as_api_error(error) from error

    def _check(self, prompts: list[list[int]], request: Request) -> None:
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        context = self.limits.context
        answer = 1 if request.token_limit is None else request.token_limit
        if len(prompts) * (request.n or 1) > MAX_CHOICES:
            raise ApiError(400, f"a request can ask for 1 to {MAX_CHOICES} answers", param=param)
        for ids in prompts:
            if len(ids) + answer > context:
                raise ApiError(
                    400, f"the model's context is {context} tokens, but a prompt of {len(ids)} and "
                    f"{answer} to generate are {len(ids) + answer}",
                    param=param, code="context_length_exceeded",
                )  # fmt: skip
            if not ids or not 0 <= min(ids) <= max(ids) < self.vocabulary:
                raise ApiError(
                    400, f"token ids must be from 0 to {self.vocabulary - 1}", param=param
                )
        limit = self.limits.max_tokens
        if limit is not None and (request.token_limit or 0) > limit:
            raise ApiError(400, f"max_tokens is at most {limit} on this server", param="max_tokens")


def as_api_error(error: Exception) -> ApiError:
    """Returns the error to send to the client; details of unexpected errors go to the log only."""
    if isinstance(error, ApiError):
        return error
    logger.error("a request failed", exc_info=error)
    return ApiError(500, f"the model failed: {type(error).__name__}", kind="server_error")
