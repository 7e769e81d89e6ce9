"""`roundwise generate`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roundwise.cli.options import (
    ChatTemplateOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
)
from roundwise.cli.output import print_json, print_note
from roundwise.system.console import console, count_of, steps, visible

if TYPE_CHECKING:
    from roundwise.inference.generation import Generated

#: Continues token ids and calls a function with each piece of text.
Answer = Callable[[list[int], Callable[[str], None]], "Generated"]


def command(
    model: ModelArgument,
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue (default: standard input).")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Answer PROMPT as a chat message, with the model's chat template; without "
            "PROMPT on a terminal: hold a conversation.",
        ),
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message at the start of the chat.")] = None,
    chat_template: ChatTemplateOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0: always the most likely token.", min=0)
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the most likely tokens that have this probability together."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from this many most likely tokens; 0: all.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text at which the answer ends; can be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for sampling (with --temperature).")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Continue a prompt, or answer a chat message; the text appears as it is generated."""
    from roundwise.errors import ConfigError
    from roundwise.inference.generation import generate
    from roundwise.inference.load import load, parse_dtype, require_tokenizer
    from roundwise.inference.prompts import encode_chat, encode_text, read_chat_template
    from roundwise.inference.sampling import Sampling, unsupported_fields
    from roundwise.system.device import parse_device

    if not chat and (system is not None or chat_template is not None):
        raise ConfigError("--system and --chat-template are for a chat: add --chat")
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
    in_conversation = chat and prompt is None and sys.stdin.isatty() and not as_json
    if prompt is None and not in_conversation:
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty: give some text to continue")
    with steps(f"loading {model}", lines=False):
        loaded, tokenizer = load(model, dtype=parse_dtype(dtype), device=parse_device(device))
    require_tokenizer(tokenizer, model)
    if unused := unsupported_fields(loaded.generation_config):
        print_note(f"note: generation_config.json: {', '.join(unused)} not used")
    if chat_template is not None:
        read_chat_template(tokenizer, chat_template)
    messages = [{"role": "system", "content": system}] if system else []
    sampling = Sampling(
        max_new_tokens, temperature, top_p, top_k, seed=seed, stop=tuple(stop or ())
    )

    def answer(ids: list[int], on_text: Callable[[str], None]) -> Generated:
        return generate(loaded, tokenizer, ids, sampling, on_text=on_text)

    if in_conversation:
        _hold_conversation(tokenizer, messages, answer)
        return
    assert prompt is not None
    ids = (
        encode_chat(tokenizer, [*messages, {"role": "user", "content": prompt}])
        if chat
        else encode_text(tokenizer, prompt)
    )
    if as_json:
        print_json({"prompt": prompt, **_as_json(answer(ids, lambda _: None))})
        return
    # The prompt comes with the first piece: an error before it leaves nothing on stdout.
    before = [] if chat else [prompt]

    def show(text: str) -> None:
        _print_piece("".join([*before, text]))
        before.clear()

    result = answer(ids, show)
    show("\n")
    _print_speed(result)


def _hold_conversation(tokenizer: Any, messages: list[dict[str, Any]], answer: Answer) -> None:
    """Reads messages from the terminal and answers them, until an empty line or Ctrl-D."""
    from roundwise.inference.prompts import encode_chat

    encode_chat(
        tokenizer, [*messages, {"role": "user", "content": "."}]
    )  # fails now if there is no template
    with contextlib.suppress(ImportError):  # it is not on every system
        import readline  # noqa: F401  # makes input() lines editable
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
        result = answer(encode_chat(tokenizer, messages), _print_piece)
        messages.append({"role": "assistant", "content": result.text})
        print()
        _print_speed(result)


def _print_piece(text: str) -> None:
    # A terminal would obey control characters; a file gets exactly what the model wrote.
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def _print_speed(result: Generated) -> None:
    speed = result.tokens_per_second
    rate = f", {speed:.1f} tokens/s after the first" if speed else ""
    text = f"{count_of(result.tokens, 'token')} in {result.seconds:.2f} s{rate}"
    console.print(text, style="dim", highlight=False)


def _as_json(result: Generated) -> dict[str, Any]:
    return {
        "text": result.text,
        "tokens": result.tokens,
        "prompt_tokens": result.prompt_tokens,
        "finish_reason": result.finish,
        "seconds": result.seconds,
        "prompt_tokens_per_second": result.prompt_tokens_per_second,
        "generation_tokens_per_second": result.tokens_per_second,
    }
