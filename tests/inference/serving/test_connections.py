"""Connections: time for the headers, a number that fits the file descriptors, and few log lines."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import uvicorn

from roundwise.errors import ConfigError
from roundwise.inference.serving import connections
from roundwise.inference.serving.connections import (
    Connection,
    OncePerMinute,
    OrderlyServer,
    connection_limits,
)

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once; /slow after half a second, /endless with a body that goes on."""
    if scope["type"] == "lifespan":
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(0.5)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


class Serving:
    """A server in a thread."""

    def __init__(self, port: int, server: OrderlyServer, stopped: threading.Event) -> None:
        self.port, self.server, self.stopped = port, server, stopped

    def connect(self, data: bytes = b"") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        client.sendall(data)
        return client

    def ask(self, path: bytes = b"/") -> bytes:
        """A whole request on a connection of its own: the response."""
        with self.connect(REQUEST.replace(b"/", path, 1) + b"Connection: close\r\n\r\n") as client:
            return rest(client)


def rest(client: socket.socket) -> bytes:
    """Everything until the other side closes."""
    content = b""
    try:
        while data := client.recv(4096):
            content += data
    except ConnectionResetError:
        pass
    return content


@contextmanager
def serving(limit: int = 100) -> Iterator[Serving]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off",
            http=partial(Connection, limit=limit),  # type: ignore[arg-type]
        )  # fmt: skip
        stopped = threading.Event()
        here = Serving(sock.getsockname()[1], OrderlyServer(config, stopped.set), stopped)
        thread = threading.Thread(target=here.server.run, args=([sock],))
        thread.start()
        try:
            while not here.server.started:
                time.sleep(0.01)
            yield here
        finally:
            here.server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "begin",
    [b"", REQUEST, REQUEST + b"X", b"G", REQUEST + b"\r\n" + REQUEST],
    ids=["nothing", "half headers", "half a line", "a letter", "half a second request"],
)
def test_connections_without_whole_headers_are_cut(begin: bytes) -> None:
    with serving() as here, here.connect(begin) as client:
        began = time.monotonic()
        rest(client)
        assert 0.2 < time.monotonic() - began < 3


@pytest.mark.usefixtures("short")
def test_headers_that_arrive_slowly_are_cut() -> None:
    with serving() as here, here.connect(REQUEST) as client:
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 5:
                client.sendall(b"X-A: b\r\n")
                time.sleep(0.05)
        assert time.monotonic() - began < 3


@pytest.mark.usefixtures("short")
def test_answers_may_take_longer_than_headers() -> None:
    with serving() as here:
        assert b"hello" in here.ask(b"/slow")
        with here.connect() as client:  # and a connection can be used again
            for _ in range(3):
                time.sleep(0.15)
                client.sendall(REQUEST + b"\r\n")
                answer = b""
                while not answer.endswith(b"0\r\n\r\n"):
                    answer += client.recv(4096)
                assert b"200 OK" in answer


def test_beyond_the_limit_the_oldest_idle_connections_are_cut(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving(limit=5) as here, ExitStack() as stack:
        idle = [stack.enter_context(here.connect(REQUEST)) for _ in range(30)]
        assert b"hello" in here.ask()
        for client in idle[:20]:
            assert rest(client) == b""
    assert "5 connections are open" in caplog.text


def test_if_all_have_sent_a_request_the_new_one_is_refused() -> None:
    slow = REQUEST.replace(b"/", b"/slow", 1) + b"\r\n"
    with serving(limit=3) as here, ExitStack() as stack:
        running = [stack.enter_context(here.connect(slow)) for _ in range(3)]
        time.sleep(0.1)
        head, _, body = here.ask().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        for client in running:
            assert b"200" in client.recv(4096)


def test_the_application_is_told_before_connections_close() -> None:
    with serving() as here:
        assert here.ask()
        assert not here.stopped.is_set()
    assert here.stopped.is_set()


@pytest.mark.parametrize(
    ("soft", "hard", "used", "expected"),
    [
        (65_536, 65_536, 20, (1000, 128)),
        (1024, 65_536, 20, (1000, 128)),  # the soft limit is raised
        (256, 256, 20, (112, 27)),
        (64, 64, 20, (16, 3)),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 20, (1000, 128)),
    ],
)
def test_limits_fit_the_file_descriptors(
    soft: int, hard: int, used: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda *limits: raised.append(limits[1]))
    monkeypatch.setattr("psutil.Process.num_fds", lambda _: used, raising=False)
    limit, burst = connection_limits()
    assert (limit, burst) == expected
    top = raised[0][0] if raised else soft
    if top != resource.RLIM_INFINITY:
        assert limit + connections.BURSTS * burst + used <= top


def test_too_few_file_descriptors_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    # A limit that was lowered by mistake would stay for all tests that follow.
    monkeypatch.setattr(resource, "setrlimit", lambda *_: pytest.fail("the limit was changed"))
    monkeypatch.setattr("psutil.Process.num_fds", lambda _: 20, raising=False)
    with pytest.raises(ConfigError, match=r"only 40 file descriptors are allowed.*ulimit -n"):
        connection_limits()


class TestLog:
    @pytest.fixture
    def lines(self) -> Iterator[list[str]]:
        """Lines of a logger with the filter."""
        kept: list[str] = []

        class Keep(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                kept.append(record.getMessage())

        log, handler, once = logging.getLogger("test.once"), Keep(), OncePerMinute(0.2)
        log.addHandler(handler)
        log.addFilter(once)
        log.propagate = False
        log.setLevel(logging.INFO)
        yield kept
        log.removeHandler(handler)
        log.removeFilter(once)

    def test_equal_warnings_are_counted(self, lines: list[str]) -> None:
        log = logging.getLogger("test.once")
        for number in range(50):
            log.warning("%d connections", number)
        log.warning("something else")
        time.sleep(0.25)
        log.warning("%d connections", 99)
        assert lines == [
            "0 connections", "something else",
            "99 connections (and 49 more like this since the last line)",
        ]  # fmt: skip

    def test_other_errors_are_logged(self, lines: list[str]) -> None:
        log = logging.getLogger("test.once")
        for error in (ValueError(), ValueError(), KeyError()):
            log.error("a request failed", exc_info=error)
        assert len(lines) == 2

    def test_information_is_not_dropped(self, lines: list[str]) -> None:
        for _ in range(3):
            logging.getLogger("test.once").info("a request")
        assert len(lines) == 3


def test_a_lack_of_descriptors_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.new_event_loop()
    context = {
        "message": "socket.accept() out of system resource",
        "exception": OSError(24, "Too many open files"),
    }
    connections._log_loop_error(loop, context)
    assert [record.exc_info for record in caplog.records] == [None]
    assert "a connection cannot be accepted: Too many open files" in caplog.text
    connections._log_loop_error(loop, {"message": "another", "exception": ValueError("x")})
    assert "another" in caplog.text
    loop.close()
