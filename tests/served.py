"""`roundwise serve` as a process, for tests of the server and of commands that ask it."""

from __future__ import annotations

import http.client
import json
import signal
import time
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import openai

from tests.helpers import Running


class Served:
    """A server under way."""

    def __init__(self, running: Running) -> None:
        self.running = running
        running.reach(lambda: running.out.exists() and "\n" in running.out.read_text(), seconds=120)
        self.started = json.loads(running.out.read_text())
        self.url: str = self.started["url"]

    @cache  # noqa: B019  # a server stops once
    def stop(self) -> None:
        """Stops the server, which must end well."""
        ended = self.running.stop(signal.SIGTERM)
        assert ended.code == 0, ended.stderr
        assert "Traceback" not in ended.stderr
        assert ended.stderr.splitlines()[-1] == "stopped"

    def raw(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any]:
        """A request as nobody's library would send it: status, and JSON or text."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        try:
            connection.request(
                method, path, body, {"Content-Type": "application/json", **(headers or {})}
            )
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        return response.status, json.loads(text) if text.startswith("{") else text

    def open_requests(self) -> int:
        return int(self.raw("GET", "/health")[1]["open_requests"])

    def wait_until_idle(self, seconds: float) -> None:
        limit = time.monotonic() + seconds
        while self.open_requests():
            assert time.monotonic() < limit, "a request is still running"
            time.sleep(0.02)

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=self.url, **{"api_key": "none", "max_retries": 0, "timeout": 60.0, **options}
        )
