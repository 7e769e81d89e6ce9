"""`roundwise serve` with vLLM, asked by the real `openai` client: the text that `generate` gives."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from numpy.typing import NDArray

import roundwise
from roundwise.inference.generation import Sampling, generate
from roundwise.inference.prompts import encode_chat, encode_text, read_chat_template
from tests.clients.conftest import ROOT, Quantize
from tests.helpers import CHAT_TEMPLATE

pytestmark = pytest.mark.clients

PROMPTS = ["def read_file(path):", "import os\n", "class Stack:\n    def push(self"]
QUESTION = [{"role": "user", "content": "open a file"}]
#: Few: after some dozens two tokens are so close that the order of additions decides.
TOKENS = 20

Serve = Callable[..., Any]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(CHAT_TEMPLATE)
    return path


@contextmanager
def served(checkpoint: Path, log: Path, *options: str | Path) -> Iterator[dict[str, Any]]:
    """A server that is ready, with vLLM's environment on the PATH; yields what it said."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    bin_folder = ROOT / ".venv-clients" / "vllm" / "bin"
    if not (bin_folder / "vllm").exists():
        pytest.fail("vllm is not installed: run scripts/test-clients")
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "roundwise", "serve", checkpoint, "--port", str(port), "--json",
             *options],
            stdout=subprocess.PIPE, stderr=errors, text=True,
            env={
                **os.environ, "PATH": f"{os.environ['PATH']}:{bin_folder}", "HF_HUB_OFFLINE": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
                "VLLM_LOGGING_LEVEL": "WARNING",
            },
        )  # fmt: skip
    try:
        assert process.stdout
        said = json.loads(process.stdout.readline())
        limit = time.monotonic() + 600
        while not healthy(port):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < limit, "the server does not become ready"
            time.sleep(0.5)
        yield said
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout
        process.stdout.close()


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.mark.usefixtures("vllm_kernels")
def test_vllm_answers_what_generate_answers(ours: Quantize, template: Path, tmp_path: Path) -> None:
    checkpoint = ours(bits=4, group_size=128)
    model, tokenizer = roundwise.load(checkpoint, dtype=torch.float16)
    read_chat_template(tokenizer, template)
    expected = [
        generate(model, tokenizer, encode_text(tokenizer, prompt), Sampling(TOKENS))
        for prompt in PROMPTS
    ]
    chat = generate(model, tokenizer, encode_chat(tokenizer, QUESTION), Sampling(TOKENS))
    with (
        served(
            checkpoint, tmp_path / "log", "--dtype", "float16", "--max-model-len", "512",
            "--chat-template", template, "--name", "tiny", "--api-key", "secret",
            "--", "--enforce-eager", "--max-num-seqs", "4",
        ) as said,
        openai.OpenAI(base_url=said["url"], api_key="secret", max_retries=0) as client,
    ):  # fmt: skip
        assert said["backend"] == "vllm"
        assert [found.id for found in client.models.list()] == ["tiny"]
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": TOKENS, "temperature": 0}
        for prompt, said_here in zip(PROMPTS, expected, strict=True):
            answer = client.completions.create(prompt=prompt, **asked)
            assert answer.choices[0].text == said_here.text
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == said_here.prompt_tokens
            assert answer.usage.completion_tokens == said_here.tokens
        pieces = client.completions.create(prompt=PROMPTS[0], stream=True, **asked)
        assert "".join(piece.choices[0].text for piece in pieces) == expected[0].text
        talked = client.chat.completions.create(messages=QUESTION, **asked)  # type: ignore[call-overload]
        assert talked.choices[0].message.content == chat.text
        with (
            client.with_options(api_key="guessed") as other,
            pytest.raises(openai.AuthenticationError),
        ):
            other.models.list()


@pytest.mark.usefixtures("vllm_kernels")
def test_measured_through_vllm(ours: Quantize, windows: NDArray[np.int64], tmp_path: Path) -> None:
    """`eval`, `compare` and `bench` with --endpoint: close to the same model in this process."""
    checkpoint, text, prompts = (
        ours(bits=4, group_size=128), tmp_path / "text.txt", tmp_path / "prompts.txt",
    )  # fmt: skip
    model, tokenizer = roundwise.load(checkpoint, dtype=torch.float32)
    text.write_text(tokenizer.decode(windows[0]))
    prompts.write_text("def read_file(path):\nimport os\n")
    expected = roundwise.perplexity(
        model, tokenizer, text.read_text(), window=100, stride=50, max_tokens=200
    )

    def measure(*arguments: str | Path) -> Any:
        ended = subprocess.run(
            [sys.executable, "-m", "roundwise", *arguments, "--json"],
            capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    with served(
        checkpoint, tmp_path / "log", "--dtype", "float16", "--max-model-len", "512",
        "--", "--enforce-eager", "--max-num-seqs", "4",
    ) as said:  # fmt: skip
        endpoint = ["--endpoint", said["url"]]
        # vLLM says which folder it serves, so that it need not be named.
        found = measure(
            "eval", *endpoint, "--text", text, "--window", "100", "--stride", "50",
            "--max-tokens", "200", "--against", checkpoint, "--dtype", "float32",
        )  # fmt: skip
        assert found["scored_by"] == "prompt_logprobs"
        assert found["tokens"] == expected.tokens
        assert found["perplexity"] == pytest.approx(expected.perplexity, rel=0.01)
        assert found["against"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
        assert 0 <= found["against"]["kl_divergence"] < 1e-3
        assert found["against"]["top1_agreement"] > 0.97
        [answers] = measure(
            "compare", checkpoint, *endpoint, "--prompts", prompts, "--max-new-tokens", str(TOKENS),
            "--dtype", "float16",
        )["prompts"]  # fmt: skip
        assert answers["agreement"] > 0.9
        loads = measure(
            "bench", *endpoint, "--concurrency", "1,4", "--prompt-tokens", "32",
            "--generated-tokens", "16", "--repetitions", "2",
        )["loads"]  # fmt: skip
        assert [load["generated_tokens"] for load in loads] == [
            2 * 16,
            8 * 16,
        ]  # it knows ignore_eos


def test_what_vllm_refuses_goes_to_transformers(ours: Quantize, tmp_path: Path) -> None:
    with (
        served(ours(bits=3, group_size=128), tmp_path / "log", "--name", "tiny") as said,
        openai.OpenAI(base_url=said["url"], api_key="none", max_retries=0) as client,
    ):
        assert said["backend"] == "transformers"
        assert said["reason"].startswith("not vLLM: its kernels take 4 bits, not 3")
        answer = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=4)
        assert answer.usage is not None
