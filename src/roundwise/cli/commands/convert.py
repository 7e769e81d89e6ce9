"""`roundwise convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from roundwise.cli.progress import JsonOption, print_json, stdout
from roundwise.system.memory import format_size


def command(
    checkpoint: Annotated[str, typer.Argument(help="Quantized checkpoint: folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    to: Annotated[str, typer.Option(help="gptq (v1), gptq_v2, compressed-tensors, or dense.")],
    dtype: Annotated[
        str, typer.Option(help="Of dense weights: auto, float32, bfloat16 or float16.")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write a GPTQ or compressed-tensors checkpoint in another format: the same numbers, exactly.

    gptq and gptq_v2 differ in how zero points are stored; compressed-tensors (pack-quantized) is the
    format of llm-compressor; dense is a plain checkpoint of the dequantized weights, for tools that
    read nothing else.
    """
    from roundwise.checkpoint.hub import local_folder
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.convert import convert
    from roundwise.inference.load import parse_dtype

    wanted = parse_dtype(dtype)
    done = convert(
        local_folder(checkpoint), out, to,  # type: ignore[arg-type]  # checked there
        dtype=None if isinstance(wanted, str) else wanted,
    )  # fmt: skip
    nbytes = Checkpoint(done).nbytes()
    if as_json:
        print_json({"output": str(done), "to": to, "bytes": nbytes})
    else:
        stdout.print(f"{done}: {to}, {format_size(nbytes)}", highlight=False, soft_wrap=True)
