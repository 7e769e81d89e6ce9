"""`roundwise convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from roundwise.cli.options import JsonOption
from roundwise.cli.output import print_json, print_line, print_note
from roundwise.system.console import steps
from roundwise.system.memory import format_size


def command(
    checkpoint: Annotated[
        str, typer.Argument(help="Quantized checkpoint: folder or Hugging Face hub id.")
    ],
    out: Annotated[Path, typer.Argument(help="Output folder; with --to gguf a file.")],
    to: Annotated[
        str,
        typer.Option(
            help="Format to write: gptq (v1), gptq_v2, compressed-tensors, dense, or gguf."
        ),
    ],
    dtype: Annotated[
        str, typer.Option(help="Data type of dense weights: auto, float32, bfloat16 or float16.")
    ] = "auto",
    template: Annotated[
        Path | None,
        typer.Option(help="gguf: dense GGUF file of the original, from llama.cpp's converter."),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(help="gguf: the original model; default: the one that the manifest names."),
    ] = None,
    rest: Annotated[
        str | None,
        typer.Option(
            help="gguf: type of what is not quantized, such as q8_0; default: the template's."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="gguf: fail if a layer cannot be written exactly.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a GPTQ or compressed-tensors checkpoint in another format: exactly the same numbers.

    gptq and gptq_v2 differ in how zero points are stored.
    compressed-tensors (pack-quantized) is the format of llm-compressor and vLLM.
    dense is a plain checkpoint of the dequantized weights, for tools that read nothing else.
    gguf is the file of llama.cpp, with the names and metadata of --template.
    """
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.convert import convert
    from roundwise.errors import ConfigError
    from roundwise.inference.load import parse_dtype
    from roundwise.system.hub import local_folder

    only_gguf = {"--template": template, "--original": original, "--rest": rest}
    if to != "gguf" and (given := [name for name, value in only_gguf.items() if value is not None]):
        raise ConfigError(f"{given[0]} is only for --to gguf")
    dense_dtype = parse_dtype(dtype)
    source = local_folder(checkpoint)
    if to == "gguf":
        if not isinstance(dense_dtype, str):
            raise ConfigError(
                "--dtype is only for --to dense: a GGUF file has the template's types"
            )
        _to_gguf(source, out, template, original, rest, strict=strict, as_json=as_json)
        return
    for note in Checkpoint(source).left_out():
        print_note(note, label="note:", style="yellow")
    with steps("converting", lines=False):
        written = convert(
            source, out, to,  # type: ignore[arg-type]  # `convert` checks it
            dtype=None if isinstance(dense_dtype, str) else dense_dtype,
        )  # fmt: skip
    nbytes = Checkpoint(written).nbytes()
    if as_json:
        print_json({"output": str(written), "to": to, "bytes": nbytes})
    else:
        print_line(f"{written}: {to}, {format_size(nbytes)}")


def _to_gguf(
    source: Path,
    out: Path,
    template: Path | None,
    original: str | None,
    rest: str | None,
    *,
    strict: bool,
    as_json: bool,
) -> None:
    """Writes a GGUF file and prints the result; the arguments are those of the command."""
    from roundwise.errors import ConfigError
    from roundwise.gguf.convert import convert_to_gguf
    from roundwise.system.hub import local_folder

    if template is None:
        raise ConfigError(
            "--to gguf needs --template: a GGUF file of the original model, made with llama.cpp's "
            "convert_hf_to_gguf.py --outtype f16"
        )
    with steps("converting", lines=False):
        result = convert_to_gguf(
            source, out, template=template, rest=rest, strict=strict,
            original=None if original is None else local_folder(original),
        )  # fmt: skip
    for line in result.notes:
        print_note(line, label="note:", style="yellow")
    for line in result.issues:
        print_note(line, label="not quantized:", style="yellow")
    if as_json:
        print_json(result.as_json())
        return
    types = ", ".join(f"{count} {kind}" for kind, count in result.types.items())
    ways = ", ".join(f"{count} {way}" for way, count in result.origins.items())
    print_line(f"{out}: {format_size(result.nbytes)}, {result.bits_per_weight:.2f} bits per weight")
    print_line(f"tensors: {types}")
    print_line(f"made from the original's tensors: {ways}")
