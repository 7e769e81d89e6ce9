"""Limits of connections, on top of uvicorn: time for the headers, number, and orderly shutdown."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import time
from collections.abc import Callable
from typing import Any

import psutil
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from roundwise.errors import ConfigError
from roundwise.inference.serving.api_errors import ApiError

#: Most open connections, idle ones included.
MAX_CONNECTIONS = 1000
#: Seconds in which a client must send the headers of a request.
HEADER_SECONDS = 10.0
#: Seconds in which equal warnings are logged only once.
LOG_SECONDS = 60.0
#: File descriptors that are left for other files than connections.
SPARE_DESCRIPTORS = 16
#: Most connections that wait to be accepted.
BACKLOG = 128
#: Bursts of new connections that can be open before the first of them is counted.
BURSTS = 4

logger = logging.getLogger("roundwise.serve")


class Connection(H11Protocol):
    """Connection of a client: it is cut if the headers of a request do not arrive in time.

    Args:
        limit: most open connections. If there are more, the one that has waited longest for its
            headers is cut; the new one is refused only if all others have sent a request.
        options: arguments of uvicorn's protocol.
    """

    def __init__(self, *, limit: int, **options: Any) -> None:
        super().__init__(**options)
        self._limit = limit
        self.waiting_since = time.monotonic()
        """Time at which the client could begin to send a request."""

    @property
    def is_waiting(self) -> bool:
        """True if no request is being answered: its headers are not complete."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time for the headers, and makes room for this connection."""
        super().connection_made(transport)
        self._limit_wait()
        if len(self.connections) <= self._limit:
            return
        logger.warning("%d connections are open: the oldest idle ones are cut", self._limit)
        others = (c for c in self.connections if isinstance(c, Connection) and c is not self)
        idle = [c for c in others if c.is_waiting and not c.transport.is_closing()]
        if idle:
            min(idle, key=lambda c: c.waiting_since).transport.abort()
        else:
            transport.write(_refusal(self._limit))
            transport.close()

    def on_response_complete(self) -> None:
        """Starts the time for the headers of the next request."""
        super().on_response_complete()
        self._limit_wait()

    def _limit_wait(self) -> None:
        self.waiting_since = since = time.monotonic()
        # Reusing a handle would need its cancelling in each request; an old one does nothing.
        self.loop.call_later(HEADER_SECONDS, self._cut, since)

    def _cut(self, since: float) -> None:
        if self.is_waiting and self.waiting_since == since and not self.transport.is_closing():
            self.transport.abort()


def _refusal(limit: int) -> bytes:
    """Returns the response for a connection beyond the limit."""
    error = ApiError(
        503, f"the server is at its limit of {limit} connections: try again later",
        kind="server_error", code="too_many_connections",
    )  # fmt: skip
    body = json.dumps(error.body).encode()
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )


def connection_limits() -> tuple[int, int]:
    """Returns the most open connections, and the most that are accepted in a burst.

    Raises the soft limit of file descriptors to what MAX_CONNECTIONS need, if the hard limit allows it.

    Raises:
        ConfigError: too few file descriptors.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    process = psutil.Process()
    used = process.num_fds() + SPARE_DESCRIPTORS
    wanted = MAX_CONNECTIONS + used + BURSTS * BACKLOG
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        soft = most
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    free = wanted if soft == resource.RLIM_INFINITY else soft - used
    burst = min(BACKLOG, free // 8)
    if burst < 2:
        raise ConfigError(
            f"only {soft} file descriptors are allowed, {used} are needed besides connections: raise "
            "the limit (ulimit -n 4096)"
        )
    return min(MAX_CONNECTIONS, free - BURSTS * burst), burst


class OncePerMinute(logging.Filter):
    """Log filter: drops a warning that equals one of the last minute, and counts it for the next."""

    def __init__(self, seconds: float = LOG_SECONDS) -> None:
        super().__init__()
        self._seconds = seconds
        self._dropped: dict[str, int] = {}
        self._logged_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns True for records to log."""
        if record.levelno < logging.WARNING:
            return True
        cause = record.exc_info[0] if record.exc_info else None
        key = f"{record.name} {str(record.msg)[:60]} {cause}"  # before its arguments are filled in
        now = time.monotonic()
        if now - self._logged_at.get(key, -self._seconds) < self._seconds:
            self._dropped[key] = self._dropped.get(key, 0) + 1
            return False
        self._logged_at[key] = now
        if count := self._dropped.pop(key, 0):
            record.msg = f"{record.getMessage()} (and {count} more like this since the last line)"
            record.args = None
        return True


class OrderlyServer(uvicorn.Server):
    """uvicorn's server, which tells the application first when it is about to stop.

    Args:
        config: uvicorn's config.
        stop: called in the event loop after SIGINT or SIGTERM, before connections are closed.
    """

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._stop = stop

    async def startup(self, sockets: Any = None) -> None:
        """Starts; errors of accepting connections become one line each, without a traceback."""
        asyncio.get_running_loop().set_exception_handler(_log_loop_error)
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(BACKLOG)  # uvicorn has one setting for this and the burst

    async def shutdown(self, sockets: Any = None) -> None:
        """Stops the application's work, then waits until the answers are sent."""
        self._stop()
        await super().shutdown(sockets)


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if isinstance(error, OSError) and "socket.accept" in context.get("message", ""):
        logger.warning("a connection cannot be accepted: %s", error.strerror)
    else:
        loop.default_exception_handler(context)
