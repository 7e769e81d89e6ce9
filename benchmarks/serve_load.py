"""Load test of `roundwise serve`: many clients at once, some of which disconnect early.

    python benchmarks/serve_load.py [CHECKPOINT] [--seconds 120] [--clients 16] [--leave 0.3]

Starts the server on a free port (without a CHECKPOINT: the bundled model, quantized first).
`openai` clients send chat and completion requests, streamed and not, and cancel a part of them at a
random moment. Afterwards no request may be open. Exit code 1 if one is, or if a request failed for
another reason than a full server (429) or its own cancellation.
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

import openai
import torch
import transformers

import roundwise
from roundwise.checkpoint.hub import bundled_model

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


def start(checkpoint: Path, scratch: Path) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """Starts the server; returns it and the JSON object that it prints when it is ready."""
    template = scratch / "chat.jinja"
    template.write_text("{% for m in messages %}# {{ m.content }}\n{% endfor %}")
    server = subprocess.Popen(
        [sys.executable, "-m", "roundwise", "serve", checkpoint, "--port", "0", "--json",
         "--backend", "transformers", "--chat-template", template],
        stdout=subprocess.PIPE, text=True,
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
    ordered = sorted(values)
    return "  ".join(
        f"p{part} {ordered[min(len(ordered) - 1, len(ordered) * part // 100)]:.2f} s"
        for part in (50, 90, 99)
    )


async def load(url: str, model: str, options: argparse.Namespace, seconds: float) -> Totals:
    """Runs all clients at once and returns their totals."""
    totals = Totals()
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as api:
        end = time.monotonic() + seconds
        await asyncio.gather(
            *(
                client(api, model, totals, end, options.leave, options.seed + number)
                for number in range(options.clients)
            )
        )
    return totals


def measure(
    server: subprocess.Popen[str], ready: dict[str, str], options: argparse.Namespace
) -> bool:
    """Runs the load test and prints the totals; returns True if nothing failed."""
    asyncio.run(load(ready["url"], ready["model"], options, 10))  # warm-up: allocators, caches
    before = rss(server.pid)
    totals = asyncio.run(load(ready["url"], ready["model"], options, options.seconds))
    limit = time.monotonic() + 10
    while (stuck := open_requests(ready["url"])) and time.monotonic() < limit:
        time.sleep(0.1)
    after = rss(server.pid)
    leave = f"{options.leave:.0%} of the requests cancelled at random"
    print(f"{options.clients} clients, {options.seconds:.0f} s, {leave}")
    print(f"requests answered: {totals.answered}  ({totals.tokens} tokens)")
    print(f"cancelled: {totals.cancelled}  refused, server full: {totals.refused}")
    print(f"failed: {sum(totals.failures.values())}  {dict(totals.failures) or ''}")
    print(f"latency, including waiting: {percentiles(totals.seconds)}")
    print(f"time to first token, streamed: {percentiles(totals.first_token)}")
    print(f"server memory before {before:.0f} MB, after {after:.0f} MB")
    print(f"requests still open: {stuck}")
    return not stuck and not totals.failures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument(
        "--leave", type=float, default=0.3, help="share of the requests that may be cancelled"
    )
    parser.add_argument("--seed", type=int, default=0)
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
        server, ready = start(checkpoint, Path(scratch))
        try:
            passed = measure(server, ready, options)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
    print(f"exit code of the server after SIGTERM: {code}")
    sys.exit(0 if passed and code == 0 else 1)


if __name__ == "__main__":
    main()
