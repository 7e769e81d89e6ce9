"""`roundwise bench`."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated

import typer

from roundwise.cli.options import DeviceOption, DtypeOption, JsonOption, ModelArgument
from roundwise.cli.output import print_json, print_labelled
from roundwise.system.console import count_of, steps
from roundwise.system.memory import format_size

if TYPE_CHECKING:
    from roundwise.evaluation.speed import Speed


def command(
    model: ModelArgument,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    generated_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Sequences generated in parallel.")] = 1,
    repetitions: Annotated[int, typer.Option(help="Measured runs; their medians are shown.")] = 3,
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
    """Measure prompt and generation speed, latency per token and memory of a model."""
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
