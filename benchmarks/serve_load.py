"""Load test of `roundwise serve`: many clients at once, some of which do not behave.

    python benchmarks/serve_load.py [CHECKPOINT] [--seconds 120] [--clients 16] [--leave 0.3]

Starts the server on a free port (without a CHECKPOINT: the bundled model, quantized first). Of 16
clients 11 are `openai` clients that send chat and completion requests, streamed and not, and cancel a
part of them at a random moment; one sends small requests only; one reads its stream a few bytes at a
time; two open connections and never finish their headers; one sends bodies of two megabytes.

Exit code 1 if a request failed for another reason than a full server (429) or its own cancellation, if
one is still open afterwards, if the memory grew by more than a tenth, or if the 99th percentile of the
small requests is more than three times that of an idle server.
With --scaling it only compares the tokens per second of one client and of eight.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import torch
import transformers

import roundwise
from roundwise.system.hub import bundled_model

PROMPTS = (
    "def read_file(path):",
    "import os\n",
    "class Stack:\n    def push(self",
    "# Sorts a list",
)


@dataclass
class Totals:
    """Results of all clients together."""

    answered: int = 0
    cancelled: int = 0
    refused: int = 0
    tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    small: list[float] = field(default_factory=list)
    slow: int = 0
    half: int = 0
    long: int = 0


async def client(
    api: openai.AsyncOpenAI, model: str, totals: Totals, end: float, leave: float, seed: int
) -> None:
    """Sends one request after another until `end`; cancels each with probability `leave`."""
    random_numbers = random.Random(seed)
    while time.monotonic() < end:
        try:
            leaves = random_numbers.random() < leave
            async with asyncio.timeout(random_numbers.uniform(0, 3) if leaves else None):
                await ask(api, model, totals, random_numbers)
        except TimeoutError:
            totals.cancelled += 1
        except openai.RateLimitError:
            totals.refused += 1
            await asyncio.sleep(0.5)
        except openai.OpenAIError as error:
            totals.failures[f"{type(error).__name__}: {error}"[:120]] += 1


async def small_requests(
    api: openai.AsyncOpenAI, model: str, totals: Totals, end: float, most: int = sys.maxsize
) -> None:
    """Sends small requests with pauses, until `end`."""
    while time.monotonic() < end and len(totals.small) < most:
        begun = time.monotonic()
        try:
            await api.completions.create(model=model, prompt=PROMPTS[0], max_tokens=8)
            totals.small.append(time.monotonic() - begun)
        except openai.OpenAIError as error:
            totals.failures[f"small: {type(error).__name__}: {error}"[:120]] += 1
        await asyncio.sleep(0.05)


async def slow_reader(host: str, port: int, model: str, totals: Totals, end: float) -> None:
    """Asks for streams and reads them a few bytes at a time; leaves before their end."""
    body = {"model": model, "prompt": PROMPTS[1], "max_tokens": 200, "stream": True, "n": 2}
    while time.monotonic() < end:
        reader, writer = await asyncio.open_connection(host, port, limit=64)
        writer.write(http_request(json.dumps(body).encode()))
        for _ in range(100):
            if time.monotonic() > end or not await reader.read(16):
                break
            await asyncio.sleep(0.05)
        totals.slow += 1
        writer.transport.abort()


async def half_headers(host: str, port: int, totals: Totals, end: float) -> None:
    """Opens connections that never finish their headers."""
    writers: list[asyncio.StreamWriter] = []
    while time.monotonic() < end:
        _, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX")
        totals.half += 1
        writers.append(writer)
        await asyncio.sleep(0.02)
    for writer in writers:
        writer.transport.abort()


async def long_lists(host: str, port: int, model: str, totals: Totals, end: float) -> None:
    """Sends bodies of two megabytes: token ids with a wrong last entry, texts, and long prompts."""
    prompts = ("[" + "1," * 900_000 + '"a"]', '"' + "word " * 380_000 + '"',
               "[[" + "],[".join(["1"] * 450_000) + "]]")  # fmt: skip
    while time.monotonic() < end:
        for prompt in prompts:
            reader, writer = await asyncio.open_connection(host, port)
            body = f'{{"model": "{model}", "prompt": {prompt}}}'.encode()
            writer.write(http_request(body))
            status = await reader.readline()
            if b" 400 " not in status:
                totals.failures[f"long list: {status.decode(errors='replace')}"] += 1
            totals.long += 1
            writer.close()
            await asyncio.sleep(1)


def http_request(body: bytes) -> bytes:
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )


async def ask(
    api: openai.AsyncOpenAI, model: str, totals: Totals, random_numbers: random.Random
) -> None:
    """Sends one request and reads the whole answer."""
    begun = time.monotonic()
    common: dict[str, Any] = {
        "model": model,
        "max_tokens": random_numbers.randint(4, 32),
        "temperature": random_numbers.choice((0.0, 0.8)),
    }
    prompt = random_numbers.choice(PROMPTS)
    if random_numbers.random() < 0.5:
        answer = await api.completions.create(prompt=prompt, **common)
        totals.tokens += answer.usage.completion_tokens if answer.usage else 0
    else:
        messages: Any = [{"role": "user", "content": prompt}]
        stream = await api.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **common
        )
        first_token = None
        async with stream:
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content and first_token is None:
                    first_token = time.monotonic() - begun
                if chunk.usage:
                    totals.tokens += chunk.usage.completion_tokens
        totals.first_token.append(first_token or time.monotonic() - begun)
    totals.answered += 1
    totals.seconds.append(time.monotonic() - begun)


def start(
    checkpoint: Path, scratch: Path, options: argparse.Namespace
) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """Starts the server; returns it and the JSON object that it prints when it is ready."""
    template = scratch / "chat.jinja"
    template.write_text("{% for m in messages %}# {{ m.content }}\n{% endfor %}")
    server = subprocess.Popen(
        [sys.executable, "-m", "roundwise", "serve", checkpoint, "--port", "0", "--json",
         "--backend", "transformers", "--chat-template", template, "--dtype", options.dtype,
         "--max-batch", str(options.max_batch)],
        stderr=(scratch / "log").open("w"), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout
    return server, json.loads(server.stdout.readline())


def rss(pid: int) -> float:
    """Returns the resident memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def open_requests(url: str) -> int:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/health") as answer:
        return int(json.load(answer)["open_requests"])


def percentiles(values: list[float]) -> str:
    if not values:
        return "none"
    return "  ".join(f"p{part} {percentile(values, part):.2f} s" for part in (50, 90, 99))


async def load(url: str, model: str, options: argparse.Namespace, seconds: float) -> Totals:
    """Runs all clients at once and returns their totals."""
    totals = Totals()
    address = urlsplit(url)
    host, port = address.hostname or "", address.port or 0
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as api:
        end = time.monotonic() + seconds
        others = [
            small_requests(api, model, totals, end),
            slow_reader(host, port, model, totals, end),
            half_headers(host, port, totals, end),
            half_headers(host, port, totals, end),
            long_lists(host, port, model, totals, end),
        ]
        await asyncio.gather(
            *others,
            *(
                client(api, model, totals, end, options.leave, options.seed + number)
                for number in range(max(0, options.clients - len(others)))
            ),
        )
    return totals


async def idle(url: str, model: str) -> Totals:
    """Sends small requests to a server that has nothing else to do."""
    totals = Totals()
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as api:
        await small_requests(api, model, totals, time.monotonic() + 60, most=150)
    return totals


async def scaling(url: str, model: str, clients: int, seconds: float) -> float:
    """Returns the tokens per second of some clients that ask for 64 tokens again and again."""
    tokens = 0

    async def one(api: openai.AsyncOpenAI, number: int) -> None:
        nonlocal tokens
        while time.monotonic() < end:
            prompt = PROMPTS[number % len(PROMPTS)]
            answer = await api.completions.create(
                model=model, prompt=prompt, max_tokens=64, temperature=0.8
            )
            tokens += answer.usage.completion_tokens if answer.usage else 0

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as api:
        begun = time.monotonic()
        end = begun + seconds
        await asyncio.gather(*(one(api, number) for number in range(clients)))
    return tokens / (time.monotonic() - begun)


def percentile(values: list[float], part: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * part // 100)] if ordered else float("nan")


def measure(
    server: subprocess.Popen[str], ready: dict[str, str], options: argparse.Namespace
) -> bool:
    """Runs the load test and prints the totals; returns True if nothing failed."""
    url, model = ready["url"], ready["model"]
    if options.scaling:
        for _ in range(2):  # the first time warms up
            one, eight = (asyncio.run(scaling(url, model, clients, 15)) for clients in (1, 8))
        print(
            f"1 client: {one:.0f} tokens/s  8 clients: {eight:.0f} tokens/s  {eight / one:.1f} times"
        )
        return True
    asyncio.run(load(url, model, options, 10))  # warm-up: allocators, caches
    alone = asyncio.run(idle(url, model))
    before = rss(server.pid)
    totals = asyncio.run(load(url, model, options, options.seconds))
    limit = time.monotonic() + 15
    while (stuck := open_requests(url)) and time.monotonic() < limit:
        time.sleep(0.1)
    after = rss(server.pid)
    leave = f"{options.leave:.0%} of the requests cancelled at random"
    print(f"{options.clients} clients, {options.seconds:.0f} s, {leave}")
    print(f"requests answered: {totals.answered}  ({totals.tokens} tokens)")
    print(f"cancelled: {totals.cancelled}  refused, server full: {totals.refused}")
    print(f"slow readers: {totals.slow}  half headers: {totals.half}  long lists: {totals.long}")
    print(f"failed: {sum(totals.failures.values())}  {dict(totals.failures) or ''}")
    print(f"latency, including waiting: {percentiles(totals.seconds)}")
    print(f"time to first token, streamed: {percentiles(totals.first_token)}")
    print(f"small requests, idle server: {len(alone.small)}  {percentiles(alone.small)}")
    print(f"small requests, loaded: {len(totals.small)}  {percentiles(totals.small)}")
    ratio = percentile(totals.small, 99) / percentile(alone.small, 99)
    print(f"p99 of small requests: {ratio:.1f} times that of an idle server")
    print(f"server memory before {before:.0f} MB, after {after:.0f} MB")
    print(f"requests still open: {stuck}")
    return not stuck and not totals.failures and ratio < 3 and after < 1.1 * before


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument(
        "--leave", type=float, default=0.3, help="share of the requests that may be cancelled"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scaling", action="store_true", help="compare one client and eight")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-batch", type=int, default=16)
    options = parser.parse_args()
    print(
        f"roundwise {roundwise.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, openai {openai.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads"
    )
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = options.checkpoint
        if checkpoint is None:
            checkpoint = Path(scratch) / "tiny-llama-4bit"
            settings = roundwise.QuantizeConfig(recipe="textbook")
            roundwise.quantize(
                bundled_model(), checkpoint, settings, "python-stdlib", samples=8, seq_len=256
            )
        server, ready = start(checkpoint, Path(scratch), options)
        try:
            passed = measure(server, ready, options)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
    print(f"exit code of the server after SIGTERM: {code}")
    sys.exit(0 if passed and code == 0 else 1)


if __name__ == "__main__":
    main()
