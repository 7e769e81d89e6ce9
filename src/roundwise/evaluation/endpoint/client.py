"""Client of a server with OpenAI's API: requests and streams, and errors in one sentence.

Measurements need fields of vLLM and llama.cpp that OpenAI's own client does not know, and the moment at
which each part of a stream arrives, so requests are plain JSON over HTTP.
"""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from roundwise.errors import MAX_LINE, CheckpointError, ConfigError, RunError, quoted
from roundwise.system.activity import announce
from roundwise.system.hub import local_folder

#: Names of this machine; requests to it never go through a proxy.
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
#: Seconds in which a server must say which model it has.
HELLO_SECONDS = 10.0


class Refused(RunError):
    """The server answered a request with an error.

    Args:
        message: sentence for the user.
        status: status code of HTTP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Unsupported(RunError):
    """The server ignored a field of a request, or answered in another form."""


class Endpoint:
    """A server with OpenAI's API, and the model that it serves.

    Args:
        url: its address, such as http://127.0.0.1:8000; `/v1` at its end may be left out.
        api_key: key that the server wants; None: no key.
        timeout: seconds that an answer, or a part of a stream, may take.

    Raises:
        ConfigError: the address is wrong, or there is no such server.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ConfigError(f"{url} is not the address of a server: try http://127.0.0.1:8000")
        self.url = re.sub(r"/+(v1/*)?$", "", parts.geturl())
        """Address without /v1."""
        self._timeout = HELLO_SECONDS
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        handlers = [urllib.request.ProxyHandler({})] if parts.hostname in LOCAL_NAMES else []
        self._opener = urllib.request.build_opener(*handlers)
        info = self._model_info()
        self.model = str(info["id"])
        """Name of the model for requests."""
        self.context: int | None = _context(info)
        """Maximum tokens of prompt and answer; None: the server does not say."""
        self.source: str | None = str(info["root"]) if info.get("root") else None
        """Folder or hub id that the server read the model from; None: it does not say."""
        self._timeout = timeout

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Sends a request and returns the JSON of its answer.

        Args:
            path: such as /v1/completions.
            body: the request; `model` is added.

        Raises:
            Refused: the server answered with an error.
            RunError: it does not answer, or not with JSON.
        """
        with self._open(path, {"model": self.model, **body}) as response:
            return _parse(response.read(), self.url)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Sends a request with `stream`, and yields its events as they arrive.

        Args:
            path: such as /v1/completions.
            body: the request; `model` and `stream` are added.

        Raises:
            Refused: the server answered with an error, before the stream or in it.
            RunError: it does not answer, or stops in the middle.
        """
        with self._open(path, {"model": self.model, "stream": True, **body}) as response:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                event = _parse(data, self.url)
                if "error" in event:
                    raise Refused(f"{self.url} stopped: {_message(data)}", 500)
                yield event
        raise RunError(f"{self.url} stopped in the middle of an answer")

    def _model_info(self) -> dict[str, Any]:
        """Returns the entry of the first model in the server's list."""
        try:
            with self._open("/v1/models", None) as response:
                answer = _parse(response.read(), self.url)
        except Refused as error:
            advice = "the address of OpenAI's API"
            if error.status in (401, 403):
                advice = "its key with --api-key"
            raise ConfigError(f"{error}: give {advice}") from error
        except RunError as error:
            raise ConfigError(f"{error}: start it first, or mend the address") from error
        models = answer.get("data") if isinstance(answer, dict) else None
        if not (isinstance(models, list) and models and isinstance(models[0], dict)):
            raise ConfigError(f"{self.url} has no list of models: give the address of OpenAI's API")
        if not isinstance(models[0].get("id"), str):
            raise ConfigError(f"{self.url} does not name its model")
        return models[0]

    @contextmanager
    def _open(self, path: str, body: dict[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        """Context manager: the response to a request; errors of the network become one sentence."""
        request = urllib.request.Request(  # noqa: S310  # http or https: see __init__
            f"{self.url}{path}", headers=self._headers,
            data=None if body is None else json.dumps(body).encode(),
        )  # fmt: skip
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                yield response
        except urllib.error.HTTPError as error:
            with error:
                text = _message(error.read())
            raise Refused(f"{self.url} refuses {path} ({error.code}): {text}", error.code) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise RunError(f"the server {self.url} does not answer ({reason})") from error


def served_model(endpoint: Endpoint, given: str | None) -> str:
    """Returns the folder or hub id of the checkpoint that a server serves.

    Args:
        endpoint: the server; vLLM says where it has the model from.
        given: what the user says; None: the server must know.

    Raises:
        ConfigError: the server does not say it, or this machine does not have it.
    """
    if given is not None:
        return given
    for name in (endpoint.source, endpoint.model):
        if name is not None:
            with suppress(CheckpointError):
                folder = str(local_folder(name))
                announce(f"the model is {folder}")
                return folder
    raise ConfigError(
        f"{endpoint.url} serves {quoted(endpoint.model)}, but does not say which folder that is: name "
        "the folder, its tokenizer is needed"
    )


def first_choice(answer: Any) -> dict[str, Any]:
    """Returns the first choice of an answer of OpenAI's API.

    Raises:
        Unsupported: the answer has another form.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise Unsupported("the answer is not one of OpenAI's API")
    return choices[0]


def _context(info: dict[str, Any]) -> int | None:
    """Returns the context that a server names: vLLM and roundwise, or llama.cpp; None: neither."""
    meta = info.get("meta")
    values = [info.get("max_model_len"), meta.get("n_ctx") if isinstance(meta, dict) else None]
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _parse(text: bytes, url: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RunError(f"{url} answered with something else than JSON ({error})") from None


def _message(body: bytes) -> str:
    """Returns the message of an error in OpenAI's format or another one, in one short line."""
    text = body.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return " ".join(str(value).split())[:MAX_LINE]
