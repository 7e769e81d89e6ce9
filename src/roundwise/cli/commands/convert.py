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
    out: Annotated[Path, typer.Argument(help="Output folder.")],
    to: Annotated[
        str, typer.Option(help="Format to write: gptq (v1), gptq_v2, compressed-tensors, or dense.")
    ],
    dtype: Annotated[
        str, typer.Option(help="Data type of dense weights: auto, float32, bfloat16 or float16.")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write a GPTQ or compressed-tensors checkpoint in another format: exactly the same numbers.

    gptq and gptq_v2 differ in how zero points are stored.
    compressed-tensors (pack-quantized) is the format of llm-compressor and vLLM.
    dense is a plain checkpoint of the dequantized weights, for tools that read nothing else.
    """
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.convert import convert
    from roundwise.inference.load import parse_dtype
    from roundwise.system.hub import local_folder

    dense_dtype = parse_dtype(dtype)
    source = local_folder(checkpoint)
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
