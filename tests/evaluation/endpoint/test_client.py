"""The client of a server: addresses, names, errors in one sentence."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from roundwise.errors import ConfigError, RunError
from roundwise.evaluation.endpoint.client import Endpoint, Refused, served_model
from tests.evaluation.endpoint.servers import Double, serving


def double(form: str = "vllm", **options: Any) -> Double:
    return Double(None, None, form, **options)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_end_of_an_address_does_not_matter(suffix: str) -> None:
    with serving(double()) as server:
        endpoint = Endpoint(server.url + suffix)
    assert endpoint.url == server.url
    assert (endpoint.model, endpoint.context, endpoint.source) == ("m", 512, "/served/here")


@pytest.mark.parametrize(("form", "context"), [("vllm", 512), ("llama.cpp", 512), ("openai", None)])
def test_the_context_that_a_server_names(form: str, context: int | None) -> None:
    with serving(double(form)) as server:
        assert Endpoint(server.url.removeprefix("http://")).context == context


@pytest.mark.parametrize("url", ["ftp://host", "file:///etc/passwd", "http://", "http://a/?q=1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a server"):
        Endpoint(url)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConfigError, match=r"does not answer \(.*refused.*\): start it first"):
        Endpoint(f"http://127.0.0.1:{port}")


def test_a_key() -> None:
    with serving(double(key="secret")) as server:
        assert Endpoint(server.url, api_key="secret").model == "m"
        with pytest.raises(ConfigError, match=r"\(401\).* give its key with --api-key"):
            Endpoint(server.url, api_key="guessed")


def test_an_error_of_the_server_is_quoted() -> None:
    with serving(double()) as server:
        endpoint = Endpoint(server.url)
        with pytest.raises(Refused, match=r"refuses /other \(404\): there is no /other") as error:
            endpoint.post("/other", {})
    assert error.value.status == 404
    with pytest.raises(RunError, match="does not answer"):
        endpoint.post("/other", {})


def test_the_folder_of_the_served_model(tmp_path: Path) -> None:
    with serving(double()) as server:
        endpoint = Endpoint(server.url)
    assert served_model(endpoint, "given") == "given"
    with pytest.raises(ConfigError, match="serves 'm', but does not say which folder"):
        served_model(endpoint, None)
    endpoint.source = str(tmp_path)
    assert served_model(endpoint, None) == str(tmp_path)
