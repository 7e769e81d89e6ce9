"""`roundwise bench`."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated

import typer

from roundwise.cli.progress import JsonOption, print_json, stdout, steps
from roundwise.system.memory import format_size

if TYPE_CHECKING:
    from roundwise.evaluation.speed import Speed


def command(
    model: Annotated[str, typer.Argument(help="Model, quantized or not: folder or hub id.")],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    generated_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Rows generated together.")] = 1,
    repetitions: Annotated[int, typer.Option(help="Measured runs; medians are shown.")] = 3,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Of the CPU (default: torch's choice).", min=1)
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="This kernel for all quantized layers, not the best.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure prompt and generation speed, latency per token and memory of a model."""
    if kernel is not None:
        os.environ["ROUNDWISE_KERNEL"] = kernel  # read where layers choose

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
    more = {
        "load_seconds": load_seconds,
        "threads": torch.get_num_threads(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
    }
    if as_json:
        print_json({**result.as_dict(), **more})
    else:
        _print(
            result, load_seconds, f"{more['dtype']} on {more['device']}, {more['threads']} threads"
        )


def _print(result: Speed, load_seconds: float, where: str) -> None:
    latency = result.latency_ms
    peak = format_size(result.peak_rss_bytes)
    if result.peak_device_bytes is not None:
        peak += f", {format_size(result.peak_device_bytes)} on the device"
    for name, text in {
        "prompt": f"{result.prompt_tokens_per_second:.1f} tokens/s  "
        f"({result.batch_size} x {result.prompt_tokens}, first token after "
        f"{latency.first_token:.1f} ms)",
        "generation": f"{result.generation_tokens_per_second:.1f} tokens/s  "
        f"({result.batch_size} x {result.generated_tokens})",
        "per token": f"p50 {latency.p50:.2f} ms, p90 {latency.p90:.2f} ms, p99 {latency.p99:.2f} ms",
        "peak memory": peak,
        "load": f"{load_seconds:.2f} s",
        "kernels": ", ".join(f"{name} {count}" for name, count in result.kernels.items()),
        "measured": f"medians of {result.repetitions} runs, {where}",
    }.items():
        stdout.print(f"{name:12} {text}", highlight=False, soft_wrap=True)
