"""`roundwise eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from roundwise.cli.output import JsonOption, print_json, stdout, steps


def command(
    model: Annotated[str, typer.Argument(help="Model, quantized or not: folder or hub id.")],
    text: Annotated[str, typer.Option(help="Text file, python-stdlib, wikitext2, c4 …")],
    window: Annotated[int, typer.Option(help="Tokens the model sees at once.")] = 2048,
    stride: Annotated[int, typer.Option(help="Tokens from one window to the next.")] = 512,
    max_tokens: Annotated[
        int | None, typer.Option(help="Only the first tokens of the text.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a model on a text, in sliding windows."""
    from roundwise.evaluation.perplexity import perplexity
    from roundwise.inference.load import load, parse_dtype
    from roundwise.pipeline.texts import read_text

    content = read_text(text)
    loaded, tokenizer = load(model, dtype=parse_dtype(dtype))
    limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", None) or window
    with steps("evaluating") as shown:
        result = perplexity(
            loaded, tokenizer, content, window=min(window, limit), stride=stride,
            max_tokens=max_tokens, progress=shown.update,
        )  # fmt: skip
    if as_json:
        print_json(vars(result))
    else:
        stdout.print(
            f"perplexity {result.perplexity:.4f}  ({result.tokens} tokens, "
            f"window {result.window}, stride {result.stride})",
            highlight=False,
        )
