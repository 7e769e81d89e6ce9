"""`roundwise serve`, asked by the real `openai` client and by clients that do not behave."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch
from lm_eval.models.openai_completions import LocalCompletionsAPI

import roundwise as rw
from tests.helpers import CHAT_TEMPLATE, Commands
from tests.served import Served

PROMPT = "def read_file(path):"
MANY = 1500
"""Tokens that take so long that a test can look on meanwhile."""


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, 4 bit."""
    out = tmp_path_factory.mktemp("served") / "tiny-4bit"
    rw.quantize(tiny, out, rw.QuantizeConfig(recipe="textbook"), str(text), samples=4, seq_len=64)
    return out


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(CHAT_TEMPLATE)
    return path


@pytest.fixture(scope="module")
def serve(commands: Commands, checkpoint: Path) -> Iterator[Callable[..., Served]]:
    """Starts servers, and stops them."""
    started: list[Served] = []

    def start(*options: object) -> Served:
        started.append(Served(commands.start("serve", checkpoint, "--port", 0, "--json", *options)))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def server(serve: Callable[..., Served], template: Path) -> Served:
    return serve("--backend", "transformers", "--chat-template", template, "--max-requests", 4,
                 "--max-bytes", 20_000)  # fmt: skip


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
    server.wait_until_idle(10)


def test_what_it_says_when_it_is_ready(server: Served) -> None:
    assert server.started["model"] == "tiny-4bit"
    assert server.started["backend"] == "transformers"
    assert server.url.startswith("http://127.0.0.1:")


class TestAnswers:
    def test_models(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == ["tiny-4bit"]
        assert client.models.retrieve("tiny-4bit").owned_by == "roundwise"
        with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
            client.models.retrieve("gpt")

    def test_a_completion_is_what_generate_says(
        self, client: openai.OpenAI, commands: Commands, checkpoint: Path
    ) -> None:
        said = commands.run("generate", checkpoint, PROMPT, "--max-new-tokens", 24, "--json").json
        answer = client.completions.create(
            model="tiny-4bit", prompt=PROMPT, max_tokens=24, temperature=0
        )
        assert answer.choices[0].text == said["text"]
        assert answer.choices[0].finish_reason == said["finish_reason"] == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == said["tokens"] == 24
        assert answer.usage.prompt_tokens == said["prompt_tokens"]
        assert answer.usage.total_tokens == 24 + said["prompt_tokens"]

    def test_a_streamed_completion_is_the_same(self, client: openai.OpenAI) -> None:
        whole = client.completions.create(
            model="tiny-4bit", prompt=PROMPT, max_tokens=24, temperature=0
        )
        chunks = list(
            client.completions.create(
                model="tiny-4bit", prompt=PROMPT, max_tokens=24, temperature=0, stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
        assert chunks[-1].usage == whole.usage
        assert not chunks[-1].choices
        assert len(chunks) > 12
        assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
        assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
            "length"
        ]

    def test_a_chat_is_what_generate_says(
        self, client: openai.OpenAI, commands: Commands, checkpoint: Path, template: Path
    ) -> None:
        said = commands.run(
            "generate", checkpoint, "open a file", "--chat", "--system", "be brief",
            "--chat-template", template, "--max-new-tokens", 16, "--json",
        ).json  # fmt: skip
        answer = client.chat.completions.create(
            model="tiny-4bit", max_completion_tokens=16, temperature=0,
            messages=[{"role": "system", "content": "be brief"},
                      {"role": "user", "content": "open a file"}],
        )  # fmt: skip
        assert answer.choices[0].message.content == said["text"]
        assert answer.choices[0].message.role == "assistant"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == said["prompt_tokens"]

    def test_a_streamed_chat_is_the_same(self, client: openai.OpenAI) -> None:
        question: Any = [{"role": "user", "content": "open a file"}]
        asked: Any = {
            "model": "tiny-4bit",
            "messages": question,
            "max_tokens": 16,
            "temperature": 0,
        }
        whole = client.chat.completions.create(**asked)
        chunks = list(
            client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
        )
        assert chunks[0].choices[0].delta.role == "assistant"
        pieces = [c.choices[0].delta.content or "" for c in chunks[:-1]]
        assert "".join(pieces) == whole.choices[0].message.content
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].usage == whole.usage

    def test_many_prompts_and_answers(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(
            model="tiny-4bit", prompt=["import os", PROMPT], n=2, max_tokens=8, seed=1
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert len({choice.text for choice in answer.choices}) == 4  # each seed another text
        again = client.completions.create(
            model="tiny-4bit", prompt=["import os", PROMPT], n=2, max_tokens=8, seed=1
        )
        assert [c.text for c in again.choices] == [c.text for c in answer.choices]
        assert again.usage == answer.usage

    def test_token_ids_and_stop_texts(self, client: openai.OpenAI, checkpoint: Path) -> None:
        ids = rw.load(checkpoint)[1](PROMPT)["input_ids"]
        plain = client.completions.create(
            model="tiny-4bit", prompt=ids, max_tokens=24, temperature=0
        ).choices[0]
        stop = plain.text[20:23]
        stopped = client.completions.create(
            model="tiny-4bit", prompt=ids, max_tokens=24, temperature=0, stop=stop
        ).choices[0]
        assert stopped.finish_reason == "stop"
        assert stopped.text == plain.text[: plain.text.index(stop)]

    def test_log_probabilities_and_echo(self, client: openai.OpenAI, checkpoint: Path) -> None:
        model, tokenizer = rw.load(checkpoint)
        ids = tokenizer(PROMPT)["input_ids"]
        [answer] = client.completions.create(
            model="tiny-4bit", prompt=ids, max_tokens=3, temperature=0, logprobs=2, echo=True
        ).choices
        assert answer.text.startswith(PROMPT)
        found = answer.logprobs
        assert found is not None
        assert found.tokens is not None
        assert found.token_logprobs is not None
        assert "".join(found.tokens) == answer.text
        assert len(found.tokens) == len(ids) + 3
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = [float(logits[at, token]) for at, token in enumerate(ids[1:])]
        assert found.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=0.05)
        [chat] = client.chat.completions.create(
            model="tiny-4bit", max_tokens=3, temperature=0, logprobs=True, top_logprobs=2,
            messages=[{"role": "user", "content": "hi"}],
        ).choices  # fmt: skip
        assert chat.logprobs is not None
        assert chat.logprobs.content is not None
        assert "".join(entry.token for entry in chat.logprobs.content) == chat.message.content
        assert [len(entry.top_logprobs) for entry in chat.logprobs.content] == [2, 2, 2]

    def test_lm_eval_reads_the_log_likelihoods_of_the_model(
        self, client: openai.OpenAI, checkpoint: Path
    ) -> None:
        """The request and the parser are those of lm-eval's `local-completions`."""
        model, tokenizer = rw.load(checkpoint)
        texts = [("def f(", "self"), ("def f(", "zebra"), ("import os\nimport", " sys")]
        contexts = [tokenizer(context)["input_ids"] for context, _ in texts]
        whole = [tokenizer(context + answer)["input_ids"] for context, answer in texts]
        answer = client.completions.create(
            model="tiny-4bit", prompt=whole, temperature=0, max_tokens=1, logprobs=1, seed=1234,
            echo=True,
        )  # fmt: skip
        found = LocalCompletionsAPI.parse_logprobs(
            answer.model_dump(), tokens=whole, ctxlens=[len(ids) for ids in contexts]
        )
        for (logprob, greedy), context, ids in zip(found, contexts, whole, strict=True):
            with torch.no_grad():
                rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            places = range(len(context), len(ids))
            expected = sum(float(rows[at - 1, ids[at]]) for at in places)
            assert logprob == pytest.approx(expected, abs=0.05)
            assert greedy == all(int(rows[at - 1].argmax()) == ids[at] for at in places)

    def test_clients_at_once_get_what_each_gets_alone(self, serve: Callable[..., Served]) -> None:
        # In bfloat16 the order of additions can decide between two tokens that are almost equal.
        server = serve("--name", "m", "--dtype", "float32")
        with server.client() as client, ThreadPoolExecutor(8) as pool:

            def ask(seed: int) -> str:
                return client.completions.create(
                    model="m", prompt=PROMPT, max_tokens=20, seed=seed, temperature=0.5
                ).choices[0].text  # fmt: skip

            alone = [ask(seed) for seed in range(8)]
            assert list(pool.map(ask, range(8))) == alone
        assert "up to 16 requests at the same time" in server.running.err.read_text()

    def test_counts_and_log(self, serve: Callable[..., Served]) -> None:
        server = serve("--name", "m", "--api-key", "secret")
        with server.client(api_key="secret") as client:
            client.completions.create(model="m", prompt="a b", max_tokens=5, temperature=0)
        status, page = server.raw("GET", "/metrics")
        assert status == 200
        assert 'vllm:generation_tokens_total{model_name="m"} 5.0' in page
        assert 'vllm:num_requests_running{model_name="m"} 0.0' in page
        [line] = [x for x in server.running.err.read_text().splitlines() if "POST" in x]
        assert "POST /v1/completions 200 " in line
        assert " + 5 tokens, length" in line


class TestBadRequests:
    @pytest.mark.parametrize(
        ("fields", "message", "code"),
        [
            ({"max_tokens": -1}, "max_tokens", None),
            ({"temperature": 9}, "temperature", None),
            ({"prompt": ""}, "the prompt is empty", None),
            ({"prompt": [4096]}, "token ids must be from 0 to 4095", None),
            ({"prompt": [[]]}, "token ids must be", None),
            ({"stop": ["a"] * 17}, "stop: List should have at most 16 items", None),
            ({"prompt": ["a"] * 65}, "1 to 64 answers", None),
            ({"logprobs": 99}, "logprobs: Input should be less", None),
            ({"max_tokens": 3000}, "context is 2048 tokens", "context_length_exceeded"),
            ({"prompt": "a " * 2500}, "context is 2048 tokens", "context_length_exceeded"),
        ],
    )
    def test_are_named(
        self, fields: dict[str, Any], message: str, code: str | None, client: openai.OpenAI
    ) -> None:
        with pytest.raises(openai.BadRequestError, match=message) as found:
            client.completions.create(**{"model": "tiny-4bit", "prompt": "a", **fields})
        assert found.value.code == code
        assert found.value.type == "invalid_request_error"

    def test_another_model(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'") as found:
            client.completions.create(model="gpt-9", prompt="a")
        assert found.value.code == "model_not_found"

    def test_too_many_bytes(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.APIStatusError, match="more than 20000 bytes") as found:
            client.completions.create(model="tiny-4bit", prompt="a" * 20_001)
        assert found.value.status_code == 413

    def test_no_such_path_or_method(self, server: Served) -> None:
        for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
            found, body = server.raw(method, path)
            assert found == status
            assert body["error"]["type"] == "invalid_request_error"

    def test_a_page_in_a_browser_cannot_ask(self, server: Served) -> None:
        body = json.dumps({"model": "tiny-4bit", "prompt": "a"}).encode()
        plain = server.raw("POST", "/v1/completions", body, {"Content-Type": "text/plain"})
        assert plain[0] == 415
        rebound = server.raw("POST", "/v1/completions", body, {"Host": "evil.example"})
        assert rebound[0] == 400
        assert server.raw("GET", "/health", headers={"Host": "localhost"})[0] == 200

    def test_a_model_without_a_template(self, serve: Callable[..., Served]) -> None:
        with serve("--name", "plain", "--api-key", "secret").client(api_key="secret") as client:
            with pytest.raises(openai.BadRequestError, match="the model has no chat template"):
                client.chat.completions.create(
                    model="plain", messages=[{"role": "user", "content": "hi"}]
                )
            assert client.completions.create(model="plain", prompt="a").usage is not None
            with (
                client.with_options(api_key="guessed") as other,
                pytest.raises(openai.AuthenticationError, match="missing or wrong") as found,
            ):
                other.models.list()
        assert found.value.code == "invalid_api_key"


class TestTrouble:
    def test_a_reader_that_goes_stops_the_generation(
        self, server: Served, client: openai.OpenAI
    ) -> None:
        with client.completions.create(
            model="tiny-4bit", prompt=PROMPT, max_tokens=MANY, temperature=0, stream=True
        ) as stream:
            next(iter(stream))
            assert server.open_requests() == 1
        server.wait_until_idle(2)
        begun = time.monotonic()
        client.completions.create(model="tiny-4bit", prompt="a", max_tokens=1)
        assert time.monotonic() - begun < 2

    def test_so_does_one_that_waits_for_the_whole(self, server: Served) -> None:
        with server.client(timeout=0.5) as client, pytest.raises(openai.APITimeoutError):
            client.completions.create(
                model="tiny-4bit", prompt=PROMPT, max_tokens=MANY, temperature=0
            )
        server.wait_until_idle(2)

    def test_too_many_at_once_are_told_so(self, server: Served, client: openai.OpenAI) -> None:
        def ask(_: int) -> str | None:
            try:
                client.completions.create(model="tiny-4bit", prompt=PROMPT, max_tokens=30)
            except openai.RateLimitError as error:
                return error.code
            return None

        with ThreadPoolExecutor(10) as pool:
            codes = list(pool.map(ask, range(10)))
        assert set(codes) == {None, "rate_limit_exceeded"}
        assert codes.count(None) >= 4
        # The client tries again by itself, so that everyone is served in the end.
        with server.client(max_retries=10) as patient, ThreadPoolExecutor(6) as pool:
            answers = pool.map(
                lambda _: patient.completions.create(model="tiny-4bit", prompt="a", max_tokens=2),
                range(6),
            )
            assert all(answer.choices for answer in answers)

    def test_what_takes_too_long_is_cut(self, serve: Callable[..., Served]) -> None:
        hurried = serve("--timeout", 1, "--max-tokens", MANY)
        with hurried.client() as client:
            with pytest.raises(
                openai.BadRequestError, match=f"max_tokens is at most {MANY} on this server"
            ):
                client.completions.create(model="tiny-4bit", prompt="a", max_tokens=MANY + 1)
            begun = time.monotonic()
            answer = client.completions.create(
                model="tiny-4bit", prompt=PROMPT, max_tokens=MANY, temperature=0
            )
            assert time.monotonic() - begun < 10
            assert answer.usage is not None
            assert 0 < answer.usage.completion_tokens < MANY
            assert answer.choices[0].finish_reason == "length"

    def test_nobody_waits_for_a_template_that_does_not_end(
        self, serve: Callable[..., Served], tmp_path: Path
    ) -> None:
        endless = tmp_path / "endless.jinja"
        endless.write_text(
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"
        )
        server = serve("--chat-template", endless, "--timeout", 2, "--name", "m")
        with server.client() as client, ThreadPoolExecutor(1) as pool:
            client.completions.create(model="m", prompt="a", max_tokens=1)
            messages: Any = [{"role": "user", "content": "hi"}]
            chat = pool.submit(client.chat.completions.create, model="m", messages=messages)
            begun = time.monotonic()
            client.completions.create(model="m", prompt="a", max_tokens=1)
            assert time.monotonic() - begun < 1
            with pytest.raises(openai.InternalServerError, match="the time limit passed"):
                chat.result()
            pool.submit(client.chat.completions.create, model="m", messages=messages)
            time.sleep(0.2)
            begun = time.monotonic()
            server.stop()
            assert time.monotonic() - begun < 8

    def test_half_headers_and_long_lists_delay_nobody(self, server: Served) -> None:
        host, _, port = urlsplit(server.url).netloc.partition(":")
        with ExitStack() as stack:
            for _ in range(300):
                half = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
                half.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX")
            body = b'{"model":"tiny-4bit","prompt":[' + b"1," * 9000 + b'"a"]}'
            begun = time.monotonic()
            status, answer = server.raw("POST", "/v1/completions", body)
            assert time.monotonic() - begun < 3
            assert status == 400
            assert answer["error"]["param"] == "prompt"

    def test_answers_end_with_a_reason_when_the_server_stops(
        self, serve: Callable[..., Served]
    ) -> None:
        server = serve("--name", "m", "--max-batch", 1)
        asked: dict[str, Any] = {"model": "m", "prompt": PROMPT, "max_tokens": MANY}
        with server.client() as client, ThreadPoolExecutor(1) as pool:
            with client.completions.create(**asked, stream=True) as stream:
                chunks = iter(stream)
                next(chunks)
                waiting = pool.submit(client.completions.create, **asked)
                while server.open_requests() < 2:
                    time.sleep(0.02)
                server.running.send(signal.SIGTERM)
                assert list(chunks)[-1].choices[0].finish_reason == "length"
            with pytest.raises(openai.InternalServerError, match="the server is stopping") as error:
                waiting.result()
            assert error.value.code == "shutting_down"
            server.stop()


class TestBadUsage:
    @pytest.mark.parametrize("key", ["", " ", "two words", "schlüssel", "tab\t", "line\n"])
    def test_a_key_that_would_not_protect(
        self, key: str, commands: Commands, checkpoint: Path
    ) -> None:
        ended = commands.run("serve", checkpoint, "--port", 0, "--api-key", key)
        assert ended.code == 2
        assert "the API key must be printable ASCII characters" in ended.sentence

    def test_an_empty_variable_is_not_an_open_door(
        self, commands: Commands, checkpoint: Path
    ) -> None:
        ended = commands.run("serve", checkpoint, "--port", 0, env={"ROUNDWISE_API_KEY": ""})
        assert ended.code == 2
        assert "ROUNDWISE_API_KEY" in ended.sentence

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--backend", "tgi"], "use auto, vllm or transformers"),
            (["--dtype", "int8"], "dtype 'int8' is not supported"),
            (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
            (["--backend", "transformers", "--", "--seed", "1"], "--seed 1 is for vLLM"),
            (["--backend", "transformers", "--tensor-parallel", 2], "--tensor-parallel is for"),
            (["--max-model-len", 4096, "--port", 0], "the model was made for 2048 tokens"),
            (["--chat-template", "missing.jinja", "--port", 0], "cannot be read"),
        ],
    )
    def test_is_refused(
        self, options: list[object], message: str, commands: Commands, checkpoint: Path
    ) -> None:
        ended = commands.run("serve", checkpoint, *options)
        assert ended.code == 2
        assert message in ended.sentence

    def test_a_model_that_is_not_there(self, commands: Commands) -> None:
        assert commands.run("serve", "/nowhere").code == 2
