"""`roundwise bench`."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from roundwise.cli.options import (
    ApiKeyOption,
    DeviceOption,
    DtypeOption,
    EndpointOption,
    JsonOption,
    ServedModelArgument,
    split_names,
)
from roundwise.cli.output import print_json, print_labelled, print_line, print_note
from roundwise.system.console import count_of, stdout, steps
from roundwise.system.memory import format_size

if TYPE_CHECKING:
    from roundwise.evaluation.endpoint.client import Endpoint
    from roundwise.evaluation.endpoint.load import Load, LoadResult, Spread
    from roundwise.evaluation.speed import Speed

#: Most requests at the same time.
MAX_CONCURRENCY = 1024


def command(
    model: ServedModelArgument = None,
    endpoint: EndpointOption = None,
    concurrency: Annotated[
        str | None,
        typer.Option(help="With --endpoint: requests at the same time, such as 1,16,32,64."),
    ] = None,
    api_key: ApiKeyOption = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    generated_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Sequences generated in parallel.")] = 1,
    repetitions: Annotated[
        int, typer.Option(help="Measured runs (--endpoint: of each client).")
    ] = 3,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads (default: torch's choice).", min=1)
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(help="Kernel for all quantized layers (default: the fastest for each)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure prompt and generation speed, latency per token and memory of a model.

    With --endpoint, throughput and latencies of the server that serves it. Exit code 1 if a request
    failed.
    """
    from roundwise.errors import ConfigError

    if endpoint is not None:
        from roundwise.evaluation.endpoint.client import Endpoint
        from roundwise.evaluation.endpoint.load import Load

        if kernel is not None or threads is not None or batch_size != 1:
            raise ConfigError(
                "--kernel, --threads and --batch-size are for a model in this process; a server has "
                "--concurrency"
            )
        numbers = _parse_concurrency(concurrency or "1")
        requests = Load(prompt_tokens, generated_tokens, repetitions, _vocabulary(model))
        _bench_server(Endpoint(endpoint, api_key=api_key), requests, numbers, as_json=as_json)
        return
    if model is None or concurrency is not None:
        raise ConfigError("name the model to measure; --concurrency needs --endpoint")
    if kernel is not None:
        os.environ["ROUNDWISE_KERNEL"] = kernel  # read when layers choose their kernel

    import torch

    from roundwise.evaluation.speed import speed
    from roundwise.inference.load import load, parse_dtype
    from roundwise.system.device import parse_device

    if threads is not None:
        torch.set_num_threads(threads)
    begun = time.monotonic()
    loaded, _ = load(model, dtype=parse_dtype(dtype), device=parse_device(device))
    load_seconds = time.monotonic() - begun
    with steps("measuring") as shown:
        result = speed(
            loaded, prompt_tokens=prompt_tokens, generated_tokens=generated_tokens,
            batch_size=batch_size, repetitions=repetitions, progress=shown.update,
        )  # fmt: skip
    threads = torch.get_num_threads()
    dtype, device = str(loaded.dtype).removeprefix("torch."), str(loaded.device)
    if as_json:
        print_json(
            {
                **result.as_dict(),
                "load_seconds": load_seconds, "threads": threads, "dtype": dtype, "device": device,
            }
        )  # fmt: skip
        return
    conditions = f"{dtype} on {device}, {count_of(threads, 'thread')}"
    print_labelled(
        {
            **_describe(result),
            "load": f"{load_seconds:.2f} s",
            "kernels": ", ".join(f"{name} {count}" for name, count in result.kernels.items()),
            "measured": f"medians of {count_of(result.repetitions, 'run')}, {conditions}",
        },
        width=12,
    )


def _parse_concurrency(text: str) -> list[int]:
    from roundwise.errors import ConfigError

    numbers = split_names(text)
    if not numbers or not all(
        number.isdecimal() and 1 <= int(number) <= MAX_CONCURRENCY for number in numbers
    ):
        raise ConfigError(
            f"--concurrency {text}: write numbers from 1 to {MAX_CONCURRENCY}, such as 1,16,32,64"
        )
    return [int(number) for number in numbers]


def _vocabulary(model: str | None) -> range:
    """Returns the tokens of a model for random prompts; None: tokens that every model has."""
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.evaluation.endpoint.load import KNOWN_TOKENS
    from roundwise.model.build import load_config, text_config
    from roundwise.system.hub import local_folder

    if model is None:
        return KNOWN_TOKENS
    config = text_config(load_config(Checkpoint(local_folder(model))))
    return range(int(config.vocab_size))


def _bench_server(server: Endpoint, load: Load, concurrencies: list[int], *, as_json: bool) -> None:
    """Measures a server, prints the result, and fails if a request failed."""
    from roundwise.evaluation.endpoint.load import measure_load

    with steps("measuring") as shown:
        results = measure_load(server, load, concurrencies, progress=shown.stage)
    if as_json:
        print_json(
            {
                "endpoint": server.url,
                "model": server.model,
                "loads": [result.as_dict() for result in results],
            }
        )
    else:
        stdout.print(_load_table(results))
        print_line(
            f"{server.model}: prompts of {count_of(load.prompt_tokens, 'token')}, up to "
            f"{load.generated_tokens} generated"
        )
    for result in results:
        if result.error is not None:
            print_note(
                f"{result.failed} of {count_of(result.failed + result.requests, 'request')} with "
                f"{result.concurrency} at a time: {result.error}",
                label="failed:", style="bold red",
            )  # fmt: skip
    if any(result.failed for result in results):
        raise typer.Exit(1)


def _load_table(results: list[LoadResult]) -> Table:
    table = Table(
        "requests\nat a time", "answered", "tokens/s", "first token, ms\np50 / p99",
        "per token, ms\np50 / p99", "request, s\np50 / p99", box=SIMPLE_HEAD,
    )  # fmt: skip
    for result in results:
        table.add_row(
            str(result.concurrency), str(result.requests),
            f"{result.generation_tokens_per_second:.1f}", _spread(result.first_token_ms, 0),
            _spread(result.per_token_ms, 1), _spread(result.request_seconds, 2),
        )  # fmt: skip
    return table


def _spread(spread: Spread | None, digits: int) -> str:
    return "-" if spread is None else f"{spread.p50:.{digits}f} / {spread.p99:.{digits}f}"


def _describe(result: Speed) -> dict[str, str]:
    """Returns speeds, latencies and memory in words: label -> text."""
    latency = result.latency_ms
    peak = format_size(result.peak_rss_bytes)
    if result.peak_device_bytes is not None:
        peak += f", {format_size(result.peak_device_bytes)} on the device"
    return {
        "prompt": f"{result.prompt_tokens_per_second:.1f} tokens/s  "
        f"({result.batch_size} x {result.prompt_tokens}, first token after "
        f"{latency.first_token:.1f} ms)",
        "generation": f"{result.generation_tokens_per_second:.1f} tokens/s  "
        f"({result.batch_size} x {result.generated_tokens})",
        "per token": f"p50 {latency.p50:.2f} ms, p90 {latency.p90:.2f} ms, p99 {latency.p99:.2f} ms",
        "peak memory": peak,
    }
