"""Runs the encoder in processes of their own, with limits of time and memory.

A chat template can loop for ever, and a text can be slow to tokenize. A thread cannot be stopped, so
this work is done by processes. One that exceeds its time or memory is killed, and another starts.

    python -P -m roundwise.inference.serving.encoder_process 0    reads and writes frames
"""

from __future__ import annotations

import asyncio
import os
import pickle
import resource
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from typing import IO, Any, TypeVar

import psutil

from roundwise.inference.serving.api_errors import ApiError, stopping_error
from roundwise.inference.serving.encoder import Encoded, Encoder
from roundwise.inference.serving.protocol import ChatRequest, Request
from roundwise.inference.serving.tool_calls import Message

#: Seconds after which encoding a request is stopped.
ENCODE_SECONDS = 10.0
#: Seconds after which a process must be ready.
START_SECONDS = 120.0
#: Bytes of memory that encoding a request may take.
ENCODE_BYTES = 1 << 30
#: Bodies of more bytes are encoded by a process of their own, so that small ones do not wait for them.
LARGE_BODY = 1 << 16
#: Niceness of that process: the generation of tokens goes first.
LARGE_NICENESS = 10

_LENGTH_BYTES = 8

R = TypeVar("R", bound=Request)


class EncoderPool:
    """Three processes: for small text requests, small chats, and large requests of both kinds.

    A template that does not end delays only other chats. The process for large requests starts when it
    is first needed.

    Args:
        encoder: encoder to run; it is copied to the processes.
        seconds: time limit of a request.
    """

    def __init__(self, encoder: Encoder, seconds: float = ENCODE_SECONDS) -> None:
        setup = pickle.dumps(encoder)
        self._text, self._chat = (EncoderProcess(setup, seconds) for _ in range(2))
        self._large = EncoderProcess(setup, seconds, niceness=LARGE_NICENESS)

    async def encode(self, body: bytes, kind: type[R]) -> Encoded[R]:
        """Returns a checked request, as `Encoder.encode` does.

        Raises:
            ApiError: the request is wrong, or encoding it takes too much time or memory.
        """
        small = self._chat if issubclass(kind, ChatRequest) else self._text
        process = self._large if len(body) > LARGE_BODY else small
        reply = await process.call(Encoder.encode, body, kind)
        assert isinstance(reply, Encoded)
        return reply

    async def parse_message(
        self, prompt: Sequence[int], answer: Sequence[int], request: ChatRequest
    ) -> Message:
        """Returns an answer in its parts, as `Encoder.parse_message` does.

        Raises:
            ApiError: the answer has another form, or parsing it takes too much time or memory.
        """
        reply = await self._chat.call(Encoder.parse_message, list(prompt), list(answer), request)
        assert isinstance(reply, Message)
        return reply

    async def start(self) -> None:
        """Starts the processes for small requests, so that the first ones do not wait for that."""
        await asyncio.gather(self._text.start(), self._chat.start())

    def kill(self) -> None:
        """Kills the processes; requests that are being encoded, and later ones, fail."""
        for process in (self._text, self._chat, self._large):
            process.kill()

    async def close(self) -> None:
        """Kills the processes and waits for their end."""
        for process in (self._text, self._chat, self._large):
            await process.close()


class EncoderProcess:
    """A process that encodes one request at a time; it is replaced if it had to be killed.

    Args:
        setup: pickled encoder.
        seconds: time limit of a request.
        niceness: how much the process lets others go first, from 0 to 19.
    """

    def __init__(self, setup: bytes, seconds: float, niceness: int = 0) -> None:
        self._setup, self._seconds, self._niceness = setup, seconds, niceness
        self._process: Process | None = None
        self._lock = asyncio.Lock()
        self._closed = False

    async def call(self, method: Callable[..., object], *arguments: object) -> object:
        """Returns the result of a method of the encoder.

        Raises:
            ApiError: whatever the method raised; or it takes too much time or memory.
        """
        async with self._lock:
            process = await self._started()
            try:
                async with asyncio.timeout(self._seconds):
                    reply = await _exchange(process, pickle.dumps((method, arguments)))
            except BaseException as error:
                await self._kill()  # or its reply would be taken for that of the next request
                raise self._explained(error) from None
        if isinstance(reply, ApiError):
            raise reply
        return reply

    async def start(self) -> None:
        """Starts the process."""
        async with self._lock:
            await self._started()

    async def _started(self) -> Process:
        if self._closed:
            raise stopping_error()
        if self._process is None:
            # -P: modules in the working folder, which may be a model's, are not imported.
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", __name__, str(self._niceness), stdin=PIPE, stdout=PIPE,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
            try:
                async with asyncio.timeout(START_SECONDS):
                    await _exchange(self._process, self._setup)
            except BaseException as error:
                await self._kill()
                raise (stopping_error() if self._closed else error) from None
        return self._process

    def _explained(self, error: BaseException) -> BaseException:
        """Returns the error for a client whose request was stopped; others as they are."""
        if self._closed:
            return stopping_error()
        if isinstance(error, TimeoutError):
            return _too_much(f"took more than {self._seconds:g} seconds")
        if isinstance(error, asyncio.IncompleteReadError | OSError):  # the process has ended
            return _too_much("needs too much memory or time")
        return error

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    def kill(self) -> None:
        """Kills the process; what it does fails, and later requests too."""
        self._closed = True
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def close(self) -> None:
        """Kills the process and waits for its end."""
        self.kill()
        await self._kill()


def _too_much(what: str) -> ApiError:
    return ApiError(
        400, f"encoding this prompt {what}, and was stopped", code="encoding_limit_exceeded"
    )


def _frame(content: bytes) -> bytes:
    """Returns a message as it is sent between the processes: its length, then its bytes."""
    return len(content).to_bytes(_LENGTH_BYTES, "little") + content


async def _exchange(process: Process, content: bytes) -> Any:
    """Sends a message to a process and returns its reply."""
    assert process.stdin and process.stdout
    process.stdin.write(_frame(content))
    await process.stdin.drain()
    length = int.from_bytes(await process.stdout.readexactly(_LENGTH_BYTES), "little")
    reply = await process.stdout.readexactly(length)
    return pickle.loads(reply)  # noqa: S301  # from a process of our own


def run_loop(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Encodes requests until the other side closes; the first message is the encoder."""
    encoder: Encoder | None = None
    reply: object
    while len(head := requests.read(_LENGTH_BYTES)) == _LENGTH_BYTES:
        content = pickle.loads(requests.read(int.from_bytes(head, "little")))  # noqa: S301
        if encoder is None:
            assert isinstance(content, Encoder)
            encoder, reply = content, None
            _limit_memory()
        else:
            _limit_time()
            reply = _call(encoder, *content)
        replies.write(_frame(pickle.dumps(reply)))
        replies.flush()


def _call(encoder: Encoder, method: Callable[..., object], arguments: tuple[object, ...]) -> object:
    try:
        return method(encoder, *arguments)
    except ApiError as error:
        return error
    except MemoryError:
        return _too_much("needs too much memory")


def _limit_memory() -> None:
    """Limits the memory to what the process has now, and `ENCODE_BYTES` more."""
    limit = psutil.Process().memory_info().vms + ENCODE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def _limit_time() -> None:
    """Limits the processor time of the next request, for the case that the server was killed."""
    limit = int(time.process_time() + 2 * ENCODE_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def main() -> None:
    """Serves the process that started this one."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the server, which stops this process
    os.nice(int(sys.argv[1]))
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the replies
    run_loop(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
