"""`roundwise demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from roundwise.cli.output import JsonOption, console, print_json, size, stdout, steps

#: Held-out tokens that perplexity is measured on, and the window.
TOKENS, WINDOW = 20_000, 512


def command(
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoints.")] = Path("demo-output"),
    samples: Annotated[int, typer.Option(help="Calibration windows of 512 tokens.")] = 128,
    as_json: JsonOption = False,
) -> None:
    """Quantize the bundled model (5.8M parameters) at 4 and 3 bits and measure what it lost.

    Calibration and evaluation texts are sources of this Python's own standard library.
    """
    from roundwise.inference.load import load
    from roundwise.models.bundled import bundled_model
    from roundwise.pipeline.texts import read_text

    source = bundled_model()
    _, tokenizer = load(source)
    ids = tokenizer(read_text("python-stdlib")[: 8 * TOKENS], verbose=False)["input_ids"][:TOKENS]
    console.print(f"model {source}, {TOKENS} held-out tokens", highlight=False, soft_wrap=True)
    rows = [_measure("original", source, ids, None)]
    for bits in (4, 3):
        for method in ("rtn", "gptq"):
            row = _quantize(source, out / f"{method}-{bits}bit", bits, method, samples, ids)
            rows.append(row)
    best = out / "gptq-4bit"
    if as_json:
        print_json({"checkpoint": str(best), "results": rows})
        return
    table = Table(
        "model", "perplexity", "bits per weight", "size", "seconds", title="roundwise demo"
    )
    for row in rows:
        table.add_row(
            row["name"], f"{row['perplexity']:.3f}",
            f"{row['bits_per_weight']:.2f}", size(row["bytes"]), f"{row['seconds']:.1f}",
        )  # fmt: skip
    stdout.print(table)
    stdout.print(f"checkpoint: {best}", highlight=False, soft_wrap=True)
    stdout.print(
        f"try it:     roundwise generate {best} 'def read_file(path):'",
        highlight=False,
        soft_wrap=True,
    )


def _quantize(
    source: Path, out: Path, bits: int, method: str, samples: int, ids: list[int]
) -> dict[str, Any]:
    from roundwise.cli.commands.quantize import _Reporter
    from roundwise.config import QuantizeConfig
    from roundwise.pipeline.quantize import quantize

    name = f"{method.upper()} {bits} bit"
    with steps(name) as shown:
        result = quantize(
            source, out, QuantizeConfig(bits=bits, method=method), "python-stdlib",
            samples=samples, seq_len=512, restart=True, progress=_Reporter(shown),
        )  # fmt: skip
    return _measure(name, out, ids, result.as_dict())


def _measure(
    name: str, folder: Path, ids: list[int], result: dict[str, Any] | None
) -> dict[str, Any]:
    import torch

    from roundwise.evaluation.perplexity import perplexity
    from roundwise.inference.load import load
    from roundwise.models.checkpoint import Checkpoint

    begun = time.monotonic()
    model, _ = load(folder, dtype=torch.float32)
    with steps(f"evaluating {name}") as shown:
        measured = perplexity(model, None, ids, window=WINDOW, progress=shown.update)
    console.print(
        f"{name}: perplexity {measured.perplexity:.3f} ({time.monotonic() - begun:.1f} s)",
        highlight=False,
    )
    tensors = Checkpoint(folder).tensors.values()
    return {
        "name": name,
        "perplexity": measured.perplexity,
        "bits_per_weight": result["bits_per_weight"] if result else 16.0,
        "bytes": sum(info.nbytes for info in tensors),
        "seconds": result["seconds"] if result else 0.0,
    }
