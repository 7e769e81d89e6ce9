"""`roundwise demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from roundwise.cli.progress import JsonOption, console, print_json, stdout, steps
from roundwise.system.memory import format_size

#: Held-out tokens that models are compared on, and the window.
TOKENS, WINDOW = 10_240, 512
#: What the report shows both models going on from.
PROMPTS = ("def read_file(path):\n", "class Stack:\n    def push(self, item):\n")


def command(
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoints.")] = Path("demo-output"),
    samples: Annotated[int, typer.Option(help="Calibration windows of 512 tokens.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Quantize the bundled model (5.8M parameters) at 4 and 3 bits and measure what it lost.

    Calibration and evaluation texts are sources of this Python's own standard library.
    """
    import torch

    from roundwise.calibration.sources import read_text
    from roundwise.checkpoint.hub import bundled_model
    from roundwise.inference.load import load

    source = bundled_model()
    base, tokenizer = load(source, dtype=torch.float32)
    ids = tokenizer(read_text("python-stdlib")[: 8 * TOKENS], verbose=False)["input_ids"][:TOKENS]
    console.print(f"model {source}, {len(ids)} held-out tokens", highlight=False, soft_wrap=True)
    rows = [_measured("original", source, base, base, ids[: 2 * WINDOW])]
    for bits in (4, 3):
        for method in ("rtn", "gptq"):
            folder = out / f"{method}-{bits}bit"
            result = _quantize(source, folder, bits, method, samples)
            quantized, _ = load(folder, dtype=torch.float32)
            rows.append(_measured(f"{method.upper()} {bits} bit", folder, base, quantized, ids))
            rows[-1] |= {key: result[key] for key in ("bits_per_weight", "seconds")}
    rows[0]["perplexity"] = rows[-1]["base_perplexity"]
    best = out / "gptq-4bit"
    page = _report(best, rows, ids, base, tokenizer)
    if as_json:
        print_json({"checkpoint": str(best), "results": rows, "report": str(page)})
        return
    table = Table(
        "model", "perplexity", "KL to original", "bits per weight", "size", "seconds",
        title="roundwise demo",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["name"], f"{row['perplexity']:.3f}", f"{row['kl_divergence']:.5f}",
            f"{row['bits_per_weight']:.2f}", format_size(row["bytes"]), f"{row['seconds']:.1f}",
        )  # fmt: skip
    stdout.print(table)
    stdout.print(f"checkpoint: {best}", highlight=False, soft_wrap=True)
    stdout.print(f"report:     {page}", highlight=False, soft_wrap=True)
    stdout.print(
        f"try it:     roundwise generate {best} 'def read_file(path):'",
        highlight=False,
        soft_wrap=True,
    )


def _quantize(source: Path, out: Path, bits: int, method: str, samples: int) -> dict[str, Any]:
    from roundwise.cli.commands.quantize import Reporter
    from roundwise.config import QuantizeConfig
    from roundwise.run.api import quantize

    with steps(f"{method.upper()} {bits} bit") as shown:
        result = quantize(
            source, out, QuantizeConfig(bits=bits, method=method), "python-stdlib",
            samples=samples, seq_len=512, restart=True, progress=Reporter(shown),
        )  # fmt: skip
    for text in result.not_as_asked:
        console.print(f"[red]not as asked:[/] {text}", highlight=False, soft_wrap=True)
    return result.as_dict()


def _report(
    folder: Path, rows: list[dict[str, Any]], ids: list[int], base: Any, tokenizer: Any
) -> Path:
    """The page about the 4 bit checkpoint, with what was just measured."""
    import torch

    from roundwise.evaluation.compare import verdict
    from roundwise.evaluation.report.facts import Answers, Evaluation, Measured
    from roundwise.evaluation.report.measure import continued
    from roundwise.evaluation.report.page import write_report
    from roundwise.inference.load import load

    shown = [rows[0], *(row for row in reversed(rows) if row["name"].endswith(" 4 bit"))]
    models = [
        Measured(
            row["name"], row["perplexity"], row["kl_divergence"], row["top1_agreement"],
            row["bytes"], row["kl_by_position"] if row is not rows[0] else [],
        )
        for row in shown
    ]  # fmt: skip
    evaluation = Evaluation(
        f"{len(ids):,} held-out tokens of Python's own library, windows of {WINDOW}",
        models, verdict((models[0].perplexity, models[1].perplexity), []),
    )  # fmt: skip
    quantized, _ = load(folder, dtype=torch.float32)
    found = [
        Answers(prompt, *(continued(model, tokenizer, prompt) for model in (base, quantized)))
        for prompt in PROMPTS
    ]
    return write_report(folder, evaluation=evaluation, answers=found)


def _measured(name: str, folder: Path, base: Any, quantized: Any, ids: list[int]) -> dict[str, Any]:
    """A row of the table."""
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.evaluation.compare import by_part
    from roundwise.evaluation.divergence import divergence

    with steps(f"evaluating {name}") as shown:
        measured = divergence(
            base, quantized, ids, window=min(WINDOW, len(ids)), progress=shown.update
        )
    console.print(f"{name}: KL to the original {measured.kl_divergence:.5f}", highlight=False)
    return {
        "name": name,
        "perplexity": measured.perplexity[1],
        "base_perplexity": measured.perplexity[0],
        "kl_divergence": measured.kl_divergence,
        "top1_agreement": measured.top1_agreement,
        "kl_by_position": by_part(measured.kl_by_position),
        "bits_per_weight": 16.0,
        "bytes": sum(info.nbytes for info in Checkpoint(folder).tensors.values()),
        "seconds": 0.0,
    }
