"""`roundwise generate`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roundwise.cli.progress import JsonOption, console, print_json

if TYPE_CHECKING:
    from roundwise.inference.generation import Generated

#: Goes on from token ids, handing each piece of text to a function.
Answer = Callable[[list[int], Callable[[str], None]], "Generated"]


def command(
    model: Annotated[str, typer.Argument(help="Model, quantized or not: folder or hub id.")],
    prompt: Annotated[
        str | None, typer.Argument(help="Text to go on with (default: standard input).")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="PROMPT is a message, put through the model's chat template; without "
            "PROMPT on a terminal: a conversation.",
        ),
    ] = False,
    system: Annotated[str | None, typer.Option(help="Instructions before the chat.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, instead of the model's own template.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.", min=0)] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling, with a temperature.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Go on with a prompt, or answer a message; the text appears as it is generated."""
    from roundwise.errors import CheckpointError, ConfigError
    from roundwise.inference.generation import Sampling, generate
    from roundwise.inference.load import load, parse_dtype
    from roundwise.inference.prompts import encode_chat, encode_text, read_chat_template
    from roundwise.system.device import parse_device

    if not chat and (system is not None or chat_template is not None):
        raise ConfigError("--system and --chat-template are for a chat: add --chat")
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
    talking = chat and prompt is None and sys.stdin.isatty() and not as_json
    if prompt is None and not talking:
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty: give some text to go on with")
    loaded, tokenizer = load(model, dtype=parse_dtype(dtype), device=parse_device(device))
    if tokenizer is None:
        raise CheckpointError(f"{model} has no tokenizer")
    if chat_template is not None:
        read_chat_template(tokenizer, chat_template)
    messages = [{"role": "system", "content": system}] if system else []
    sampling = Sampling(max_new_tokens, temperature, seed=seed, stop=tuple(stop or ()))

    def answer(ids: list[int], on_text: Callable[[str], None]) -> Generated:
        return generate(loaded, tokenizer, ids, sampling, on_text=on_text)

    if talking:
        _talk(tokenizer, messages, answer)
        return
    assert prompt is not None
    ids = (
        encode_chat(tokenizer, [*messages, {"role": "user", "content": prompt}])
        if chat
        else encode_text(tokenizer, prompt)
    )
    if as_json:
        print_json({"prompt": prompt, **_figures(answer(ids, lambda _: None))})
        return
    if not chat:
        _show(prompt)
    result = answer(ids, _show)
    print()
    _speed(result)


def _talk(tokenizer: Any, messages: list[dict[str, Any]], answer: Answer) -> None:
    """A conversation on the terminal, until its end (Ctrl-D) or an empty line."""
    from roundwise.inference.prompts import encode_chat

    encode_chat(tokenizer, [*messages, {"role": "user", "content": "."}])  # no template: say so now
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401  # input() lets lines be edited and recalled with it
    console.print("an empty line or Ctrl-D ends the conversation")
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if not line.strip():
            return
        messages.append({"role": "user", "content": line})
        result = answer(encode_chat(tokenizer, messages), _show)
        messages.append({"role": "assistant", "content": result.text})
        print()
        _speed(result)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _speed(result: Generated) -> None:
    speed = result.tokens_per_second
    rate = f", {speed:.1f} tokens/s after the first" if speed else ""
    console.print(
        f"{result.tokens} tokens in {result.seconds:.2f} s{rate}", style="dim", highlight=False
    )


def _figures(result: Generated) -> dict[str, Any]:
    return {
        "text": result.text,
        "tokens": result.tokens,
        "prompt_tokens": result.prompt_tokens,
        "finish_reason": result.finish,
        "seconds": result.seconds,
        "prompt_tokens_per_second": result.prompt_tokens_per_second,
        "generation_tokens_per_second": result.tokens_per_second,
    }
