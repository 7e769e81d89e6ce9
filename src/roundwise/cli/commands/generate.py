"""`roundwise generate`."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from roundwise.cli.output import JsonOption, print_json


def command(
    model: Annotated[str, typer.Argument(help="Model, quantized or not: folder or hub id.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on with.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling, with a temperature.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Go on with a prompt; the text appears as it is generated."""
    import torch
    from transformers import TextStreamer

    from roundwise.errors import CheckpointError, ConfigError
    from roundwise.inference.load import load, parse_dtype

    if not prompt:
        raise ConfigError("the prompt is empty: give some text to go on with")
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
    loaded, tokenizer = load(model, dtype=parse_dtype(dtype))
    if tokenizer is None:
        raise CheckpointError(f"{model} has no tokenizer")
    inputs = tokenizer(prompt, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    streamer = None if as_json else TextStreamer(tokenizer, skip_special_tokens=True)
    begun = time.monotonic()
    output = loaded.generate(
        **inputs, max_new_tokens=max_new_tokens, streamer=streamer,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0, **options,
    )[0]  # fmt: skip
    seconds = time.monotonic() - begun
    new = output[inputs["input_ids"].shape[1] :]
    if as_json:
        print_json(
            {"prompt": prompt, "text": tokenizer.decode(new, skip_special_tokens=True),
             "tokens": len(new), "seconds": seconds}
        )  # fmt: skip
