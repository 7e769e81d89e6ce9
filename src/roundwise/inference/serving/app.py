"""The server's routes: check requests, queue them, and answer whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import Any, NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from roundwise.inference.generation import Generated
from roundwise.inference.serving.api_errors import ApiError, busy_error, timeout_error
from roundwise.inference.serving.encoder import Encoder, as_api_error
from roundwise.inference.serving.encoder_process import EncoderPool
from roundwise.inference.serving.engines.engine import Engine, SingleEngine
from roundwise.inference.serving.engines.queue import GenerationQueue
from roundwise.inference.serving.metrics import RECORD, Metrics, Record, RequestLog
from roundwise.inference.serving.middleware import (
    Deadlines,
    Guard,
    handle_api_error,
    handle_disconnect,
    handle_http_error,
)
from roundwise.inference.serving.protocol import ChatRequest, CompletionRequest, Limits, Request
from roundwise.inference.serving.responses import Choice, Piece, ResponseFormat, usage
from roundwise.inference.serving.tool_calls import response_template
from roundwise.model.build import text_config

#: Host names accepted by a server for its own machine only. Others are refused: a web page could point a
#: name of its own at this machine (DNS rebinding).
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")
#: Seconds after the time limit at which a connection is cut, if the client does not read its answer.
GRACE = 10.0
#: Seconds in which the body of a request must arrive.
BODY_SECONDS = 60.0
#: Seconds that running requests have when the server stops.
STOP_GRACE = 3.0
#: Seconds that the computation of a token has then.
STOP_SECONDS = 5.0


class Job(NamedTuple):
    """A request that was checked, its encoded prompts, and the time at which it must end."""

    request: Request
    prompts: list[array[int]]
    deadline: float
    record: Record

    @property
    def has_tools(self) -> bool:
        """True if the model may call tools."""
        return isinstance(self.request, ChatRequest) and bool(self.request.usable_tools)


class Server:
    """Answers requests; `app` is the ASGI application.

    Args:
        model: transformers causal language model.
        tokenizer: its tokenizer.
        name: name of the model for clients.
        limits: limits for requests.
        engine: generates the answers; None: one at a time.
        api_key: key that clients must send; None: no key is needed.
        hosts: accepted host names of the server; None: all.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        limits: Limits,
        *,
        engine: Engine | None = None,
        api_key: str | None = None,
        hosts: list[str] | None = None,
    ) -> None:
        self.engine = engine or SingleEngine(model, tokenizer)
        self.queue = GenerationQueue(self.engine, limits.max_requests)
        self._model = model
        vocabulary = text_config(model.config).vocab_size
        template = response_template(tokenizer, model.config.model_type)
        self._encoder = Encoder(tokenizer, name, vocabulary, limits, template)
        self._encoders = EncoderPool(self._encoder)
        self._deadlines = Deadlines(limits.timeout + GRACE)
        self.metrics = Metrics(
            name, lambda: self.queue.count(True), lambda: self.queue.count(False)
        )
        self.ended = False
        """All computations have ended; if not, only the end of the process ends them."""
        self._unread = 0  # bytes of bodies that are being received
        self.name, self.limits, self._started_at = name, limits, int(time.time())
        self.app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ],
            middleware=[
                Middleware(RequestLog, metrics=self.metrics),
                Middleware(TrustedHostMiddleware, allowed_hosts=hosts or ["*"]),
                Middleware(Guard, api_key=api_key, deadlines=self._deadlines),
            ],
            exception_handlers={
                ApiError: handle_api_error,
                HTTPException: handle_http_error,
                ClientDisconnect: handle_disconnect,
            },
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with self.running():
            yield

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Context manager: the server can answer; its processes and threads end with it."""
        try:
            await self._encoders.start()
            yield
        finally:
            self.stop()
            await self._encoders.close()
            self.ended = await asyncio.to_thread(self.engine.close, STOP_SECONDS)

    def stop(self) -> None:
        """Ends all work: generations return what they have, waiting requests fail."""
        self.engine.stop()
        self._encoders.kill()
        self._deadlines.shorten(STOP_GRACE)

    async def health(self, _: HttpRequest) -> Response:
        """GET /health: status, and number of open requests."""
        return JSONResponse({"status": "ok", "open_requests": self.queue.open_requests})

    async def show_metrics(self, _: HttpRequest) -> Response:
        """GET /metrics: counts for Prometheus."""
        return Response(self.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, _: HttpRequest) -> Response:
        """GET /v1/models: a list with the one model of this server."""
        return JSONResponse({"object": "list", "data": [self._model_info()]})

    async def model(self, http: HttpRequest) -> Response:
        """GET /v1/models/NAME: the model, if it has this name."""
        self._encoder.check_name(http.path_params["name"])
        return JSONResponse(self._model_info())

    async def completions(self, http: HttpRequest) -> Response:
        """POST /v1/completions: continues texts."""
        return await self._answer(http, CompletionRequest)

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions: answers a conversation."""
        return await self._answer(http, ChatRequest)

    def _model_info(self) -> dict[str, Any]:
        return {
            "id": self.name, "object": "model", "created": self._started_at, "owned_by": "roundwise",
            "max_model_len": self.limits.context,
        }  # fmt: skip

    async def _body(self, http: HttpRequest) -> bytes:
        """Reads the body of a request.

        Raises:
            ApiError: it has too many bytes or the wrong content type, or is too slow.
        """
        # A web page of another site cannot send this type without permission from us (CORS preflight).
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the content type must be application/json")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in http.stream():
                    body += part
                    self._unread += len(part)
                    if len(body) > self.limits.max_bytes:
                        raise ApiError(
                            413, f"the request has more than {self.limits.max_bytes} bytes"
                        )
                    if self._unread > self.limits.max_bytes * self.limits.max_requests:
                        raise busy_error("too many requests are being received")
        except TimeoutError:
            raise ApiError(
                408, f"the body of the request took more than {BODY_SECONDS:g} seconds"
            ) from None
        finally:
            self._unread -= len(body)
        return bytes(body)

    async def _answer(self, http: HttpRequest, kind: type[Request]) -> Response:
        """Checks a request, waits for its turn and answers it.

        Args:
            http: the HTTP request.
            kind: class of the body.
        """
        body = await self._body(http)
        with ExitStack() as slot:
            slot.enter_context(self.queue.slot())
            deadline = time.monotonic() + self.limits.timeout
            try:
                async with asyncio.timeout(self.limits.timeout):
                    request, prompts = await self._encoders.encode(body, kind)
            except TimeoutError:
                raise timeout_error() from None
            except Exception as error:
                raise as_api_error(error) from error
            job = Job(request, prompts, deadline, http.scope[RECORD])
            job.record.prompt_tokens = sum(map(len, prompts))
            chat = isinstance(request, ChatRequest)
            formatter = ResponseFormat(chat=chat, model=self.name, identity=uuid.uuid4().hex)
            if request.stream:
                return _EventStream(self._stream_events(job, formatter), slot.pop_all())
            return await self._whole_response(http, job, formatter)

    async def _generate(self, job: Job) -> AsyncGenerator[tuple[int, Piece | Choice]]:
        """Generates all answers of a request; yields (index, piece) and (index, answer)."""
        choices = job.request.n or 1
        for index in range(len(job.prompts) * choices):
            ids = job.prompts[index // choices]
            sampling = job.request.sampling(
                self._token_limit(job.request, len(ids)), self._model, index
            )
            echo = isinstance(job.request, CompletionRequest) and job.request.echo
            pieces: list[Piece] = []
            answer = self.queue.answer(
                ids, sampling, job.deadline, echo=echo, at_once=not job.request.stream
            )
            async with aclosing(answer) as items:
                async for item in items:
                    job.record.add(item)
                    if isinstance(item, Piece):
                        pieces.append(item)
                        yield index, item
                    else:
                        yield index, await self._choice(job, ids, pieces, item)

    async def _choice(
        self, job: Job, ids: Sequence[int], pieces: list[Piece], generated: Generated
    ) -> Choice:
        """Returns a whole answer; if the request has tools, in its parts."""
        message = None
        if job.has_tools:
            assert isinstance(job.request, ChatRequest)
            message = await self._encoders.parse_message(ids, generated.ids, job.request)
        return Choice(tuple(pieces), generated, message)

    def _token_limit(self, request: Request, prompt_tokens: int) -> int:
        """Returns the most tokens to generate for a prompt."""
        limit = request.token_limit
        if limit is None:
            default = 16 if isinstance(request, CompletionRequest) else self.limits.context
            limit = min(default, self.limits.max_tokens or default)
        return min(limit, self.limits.context - prompt_tokens)

    async def _whole_response(
        self, http: HttpRequest, job: Job, formatter: ResponseFormat
    ) -> Response:
        """Generates all answers and returns them as one response; stops if the client disconnects."""

        async def collect() -> list[Choice]:
            async with aclosing(self._generate(job)) as items:
                return [item async for _, item in items if isinstance(item, Choice)]

        generation = asyncio.ensure_future(collect())
        disconnect = asyncio.ensure_future(_wait_for_disconnect(http))
        try:
            await asyncio.wait({generation, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not generation.done():
                return handle_disconnect(http, None)
            answers = generation.result()
        except Exception as error:
            raise as_api_error(error) from error
        finally:
            for task in (generation, disconnect):
                task.cancel()
            await asyncio.gather(generation, disconnect, return_exceptions=True)
        counts = usage([answer.generated for answer in answers], len(job.prompts))
        return JSONResponse(formatter.response(answers, counts))

    async def _stream_events(self, job: Job, formatter: ResponseFormat) -> AsyncGenerator[str]:
        """Generates all answers and yields them as server-sent events; errors are events too."""
        answers: list[Generated] = []
        started = -1  # the last answer that has begun
        try:
            async with aclosing(self._generate(job)) as items:
                async for index, item in items:
                    if index > started and (chunk := formatter.first_chunk(index)):
                        yield _event(chunk)
                    started = index
                    if isinstance(item, Choice):
                        answers.append(item.generated)
                        if job.has_tools:
                            yield _event(formatter.message_chunk(index, item))
                        yield _event(formatter.last_chunk(index, item))
                    elif not job.has_tools:  # with tools, the parts are known only at the end
                        yield _event(formatter.piece_chunk(index, item))
            if job.request.stream_options and job.request.stream_options.include_usage:
                yield _event(formatter.usage_chunk(usage(answers, len(job.prompts))))
        except Exception as error:
            yield _event(as_api_error(error).body)
        yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Response of server-sent events that releases its slot however it ends, even before it starts."""

    def __init__(self, events: AsyncGenerator[str], slot: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events, self._slot = events, slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._slot:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await self._events.aclose()  # stops the generation if the client has disconnected


async def _wait_for_disconnect(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
