"""The server's routes: what is asked is checked, queued and answered, whole or in pieces."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from roundwise.errors import UsageError
from roundwise.inference.generation import Generated
from roundwise.inference.prompts import encode_chat, encode_text
from roundwise.inference.serving.middleware import (
    Guard,
    answer_api_error,
    answer_http_error,
    answer_nobody,
    as_api_error,
)
from roundwise.inference.serving.protocol import (
    MAX_CHOICES,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Request,
    Shape,
    parse,
    usage,
)
from roundwise.inference.serving.queue import Queue

#: What a browser may call a server on its own machine; another name is a page's trick to get in.
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")
#: Seconds beyond the time limit after which a connection is cut: for one that does not read.
GRACE = 10.0


@dataclass(frozen=True)
class Limits:
    """What one client may ask of the server."""

    context: int
    """Tokens of prompt and answer together."""
    max_tokens: int | None = None
    """Tokens of one answer; None: what the context leaves."""
    max_requests: int = 32
    """Requests that run and wait; one is computed at a time."""
    max_bytes: int = 2_000_000
    """Of a request's body."""
    timeout: float = 600.0
    """Seconds for a request, waiting included."""


class Job(NamedTuple):
    """A request that has been understood."""

    request: Request
    prompts: list[list[int]]
    deadline: float


class Server:
    """Answers requests; `app` is the ASGI application.

    Args:
        model, tokenizer: what is served.
        name: what clients call it.
        limits: what one client may ask.
        api_key: that clients must send; None: none.
        hosts: names by which the server may be called; None: any.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        limits: Limits,
        *,
        api_key: str | None = None,
        hosts: list[str] | None = None,
    ) -> None:
        self.queue = Queue(model, tokenizer, limits.max_requests)
        self.name, self.limits, self._begun = name, limits, int(time.time())
        self.app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ],
            middleware=[
                Middleware(TrustedHostMiddleware, allowed_hosts=hosts or ["*"]),
                Middleware(Guard, api_key=api_key, seconds=limits.timeout + GRACE),
            ],
            exception_handlers={
                ApiError: answer_api_error,
                HTTPException: answer_http_error,
                ClientDisconnect: answer_nobody,
            },
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self.queue.close()

    async def health(self, _: HttpRequest) -> Response:
        """Whether it is there, and how busy."""
        return JSONResponse({"status": "ok", "open_requests": self.queue.open})

    async def models(self, _: HttpRequest) -> Response:
        """The one model there is."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, http: HttpRequest) -> Response:
        """The same, by its name."""
        self._check_name(http.path_params["name"])
        return JSONResponse(self._card())

    async def completions(self, http: HttpRequest) -> Response:
        """Goes on with texts."""
        request = parse(await self._body(http), CompletionRequest)
        encode = self.queue.tokenizer
        return await self._answer(
            http,
            request,
            lambda: [
                encode_text(encode, prompt) if isinstance(prompt, str) else prompt
                for prompt in request.prompts()
            ],
        )

    async def chat(self, http: HttpRequest) -> Response:
        """Goes on with a conversation."""
        request = parse(await self._body(http), ChatRequest)
        messages = [message.as_dict() for message in request.messages]
        return await self._answer(
            http, request, lambda: [encode_chat(self.queue.tokenizer, messages)]
        )

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.name, "object": "model", "created": self._begun, "owned_by": "roundwise",
            "max_model_len": self.limits.context,
        }  # fmt: skip

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404, f"there is no model {name!r} here: this is {self.name!r}",
                param="model", code="model_not_found",
            )  # fmt: skip

    async def _body(self, http: HttpRequest) -> bytes:
        """The body of a request, as long as it is no longer than allowed."""
        # Asked for by name: a page in a browser cannot send this type to us without asking first.
        if http.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError(415, "the content type must be application/json")
        body = bytearray()
        async for part in http.stream():
            body += part
            if len(body) > self.limits.max_bytes:
                raise ApiError(413, f"the request has more than {self.limits.max_bytes} bytes")
        return bytes(body)

    async def _answer(
        self, http: HttpRequest, request: Request, encode: Callable[[], list[list[int]]]
    ) -> Response:
        """Checks what is asked and answers, whole or in pieces."""
        self._check_name(request.model)
        chat = isinstance(request, ChatRequest)
        shape = Shape(chat=chat, model=self.name, identity=uuid.uuid4().hex)
        with ExitStack() as place:
            place.enter_context(self.queue.place())
            deadline = time.monotonic() + self.limits.timeout
            try:
                prompts = await self.queue.encode(encode)
            except UsageError as error:
                param = "messages" if chat else "prompt"
                raise ApiError(400, str(error), param=param) from error
            except Exception as error:  # of the tokenizer or the template
                raise as_api_error(error) from error
            self._check_prompts(prompts, request, chat=chat)
            job = Job(request, prompts, deadline)
            if request.stream:
                return _Events(self._events(job, shape), place.pop_all())
            return await self._whole(http, job, shape)

    def _check_prompts(self, prompts: list[list[int]], request: Request, *, chat: bool) -> None:
        param = "messages" if chat else "prompt"
        vocabulary = self.queue.model.config.get_text_config().vocab_size
        if not prompts or len(prompts) * (request.n or 1) > MAX_CHOICES:
            raise ApiError(400, f"one to {MAX_CHOICES} answers can be asked for", param=param)
        for ids in prompts:
            if not ids or not all(0 <= token < vocabulary for token in ids):
                raise ApiError(400, f"token ids must be from 0 to {vocabulary - 1}", param=param)
            needed = len(ids) + (request.wanted_tokens or 1)
            if needed > self.limits.context:
                raise ApiError(
                    400, f"the model's context is {self.limits.context} tokens: {len(ids)} of the "
                    f"prompt and {request.wanted_tokens or 1} to generate are {needed}",
                    param=param, code="context_length_exceeded",
                )  # fmt: skip
        limit = self.limits.max_tokens
        if limit is not None and (request.wanted_tokens or 0) > limit:
            raise ApiError(400, f"max_tokens is at most {limit} here", param="max_tokens")

    async def _items(self, job: Job) -> AsyncGenerator[tuple[int, str | Generated]]:
        """All answers of a request, one after the other, as (index, piece)."""
        usual = 16 if isinstance(job.request, CompletionRequest) else self.limits.context
        wanted = job.request.wanted_tokens or min(usual, self.limits.max_tokens or usual)
        for index in range(len(job.prompts) * (job.request.n or 1)):
            ids = job.prompts[index // (job.request.n or 1)]
            sampling = job.request.sampling(
                min(wanted, self.limits.context - len(ids)), self.queue.model, index
            )
            async with aclosing(self.queue.answer(ids, sampling, job.deadline)) as pieces:
                async for piece in pieces:
                    yield index, piece

    async def _whole(self, http: HttpRequest, job: Job, shape: Shape) -> Response:
        async def collect() -> list[Generated]:
            async with aclosing(self._items(job)) as items:
                return [item async for _, item in items if isinstance(item, Generated)]

        work, gone = asyncio.ensure_future(collect()), asyncio.ensure_future(_gone(http))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return answer_nobody(http, None)
            answers = work.result()
        except Exception as error:
            raise as_api_error(error) from error
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        return JSONResponse(shape.whole(answers, usage(answers, len(job.prompts))))

    async def _events(self, job: Job, shape: Shape) -> AsyncGenerator[str]:
        answers: list[Generated] = []
        begun = -1
        try:
            async with aclosing(self._items(job)) as items:
                async for index, item in items:
                    if index > begun and (start := shape.begin(index)):
                        yield _event(start)
                    begun = index
                    if isinstance(item, Generated):
                        answers.append(item)
                        yield _event(shape.end(index, item))
                    else:
                        yield _event(shape.piece(index, item))
            if job.request.stream_options and job.request.stream_options.include_usage:
                yield _event(shape.counts(usage(answers, len(job.prompts))))
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield _event(as_api_error(error).body)


class _Events(StreamingResponse):
    """Server-sent events that give their place back however they end, even before they begin."""

    def __init__(self, events: AsyncGenerator[str], place: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events, self._place = events, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await self._events.aclose()  # stops the generation where the client has gone


async def _gone(http: HttpRequest) -> None:
    """Returns when the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
