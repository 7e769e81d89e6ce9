"""`roundwise demo`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from roundwise.cli.options import JsonOption
from roundwise.cli.output import print_json, print_line, print_note
from roundwise.system.console import stdout, steps
from roundwise.system.memory import format_size

if TYPE_CHECKING:
    from roundwise.run.api import QuantizeResult

#: Held-out tokens that models are compared on, and the window.
TOKENS, WINDOW = 10_240, 512
#: Prompts that both models continue in the report.
PROMPTS = ("def read_file(path):\n", "class Stack:\n    def push(self, item):\n")


@dataclass(frozen=True)
class Row:
    """One model of the demo, with what was measured; `as_dict` is its entry in --json."""

    name: str
    perplexity: float
    base_perplexity: float
    """The original model's, on the same tokens."""
    kl_divergence: float
    top1_agreement: float
    kl_by_position: list[tuple[int, float]]
    """First position of a part of the window, and the mean KL there."""
    bits_per_weight: float
    bytes: int
    seconds: float
    """Duration of the quantization."""

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return asdict(self)


def command(
    out: Annotated[Path, typer.Argument(help="Output folder for the checkpoints.")] = Path(
        "demo-output"
    ),
    samples: Annotated[int, typer.Option(help="Number of calibration windows of 512 tokens.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Quantize the bundled model (5.8M parameters) at 4 and 3 bits and measure what it lost.

    Calibration and evaluation texts are source files of this Python's standard library.
    """
    import torch

    from roundwise.calibration.sources import read_text
    from roundwise.inference.load import load
    from roundwise.system.hub import bundled_model

    source = bundled_model()
    base, tokenizer = load(source, dtype=torch.float32)
    ids = tokenizer(read_text("python-stdlib")[: 8 * TOKENS], verbose=False)["input_ids"][:TOKENS]
    print_note(f"model {source}, {len(ids)} held-out tokens")
    original = _measure("original", source, base, base, ids[: 2 * WINDOW])
    rows = []
    for bits in (4, 3):
        for method in ("rtn", "gptq"):
            folder = out / f"{method}-{bits}bit"
            result = _quantize(source, folder, bits, method, samples)
            quantized, _ = load(folder, dtype=torch.float32)
            row = _measure(f"{method.upper()} {bits} bit", folder, base, quantized, ids)
            rows.append(
                replace(row, bits_per_weight=result.bits_per_weight, seconds=result.seconds)
            )
    # Measured on a few tokens against itself; the others know its perplexity on all of them.
    original = replace(original, perplexity=rows[-1].base_perplexity)
    best = out / "gptq-4bit"
    page = _write_report(best, original, rows, ids, base, tokenizer)
    if as_json:
        results = [row.as_dict() for row in (original, *rows)]
        print_json({"checkpoint": str(best), "results": results, "report": str(page)})
        return
    stdout.print(_table([original, *rows]))
    print_line(f"checkpoint: {best}")
    print_line(f"report:     {page}")
    print_line(f"try it:     roundwise generate {best} 'def read_file(path):'")


def _quantize(source: Path, out: Path, bits: int, method: str, samples: int) -> QuantizeResult:
    from roundwise.config import QuantizeConfig
    from roundwise.run.api import quantize
    from roundwise.run.reporter import Reporter

    with steps(f"{method.upper()} {bits} bit") as shown:
        result = quantize(
            source, out, QuantizeConfig(bits=bits, method=method), "python-stdlib",
            samples=samples, seq_len=512, restart=True, progress=Reporter(shown),
        )  # fmt: skip
    for issue in result.not_as_asked:
        print_note(issue, label="not as asked:", style="red")
    return result


def _measure(name: str, folder: Path, base: Any, quantized: Any, ids: list[int]) -> Row:
    """Returns a row for a model.

    Args:
        name: of the row.
        folder: its checkpoint.
        base, quantized: the original model, and the one to measure.
        ids: held-out tokens.
    """
    from roundwise.checkpoint.reader import Checkpoint
    from roundwise.evaluation.compare import means_by_part
    from roundwise.evaluation.divergence import divergence

    with steps(f"evaluating {name}") as shown:
        measured = divergence(
            base, quantized, ids, window=min(WINDOW, len(ids)), progress=shown.update
        )
    print_note(f"{name}: KL to the original {measured.kl_divergence:.5f}")
    return Row(
        name=name,
        perplexity=measured.perplexity[1],
        base_perplexity=measured.perplexity[0],
        kl_divergence=measured.kl_divergence,
        top1_agreement=measured.top1_agreement,
        kl_by_position=means_by_part(measured.kl_by_position),
        bits_per_weight=16.0,
        bytes=sum(info.nbytes for info in Checkpoint(folder).tensors.values()),
        seconds=0.0,
    )


def _write_report(
    folder: Path, original: Row, rows: list[Row], ids: list[int], base: Any, tokenizer: Any
) -> Path:
    """Writes the report of the 4 bit checkpoint, with what was just measured, and returns its path."""
    import torch

    from roundwise.evaluation.report.facts import Answers, Evaluation, ModelMetrics
    from roundwise.evaluation.report.measure import greedy_answer
    from roundwise.evaluation.report.page import write_report
    from roundwise.evaluation.verdict import verdict
    from roundwise.inference.load import load

    shown = [original, *(row for row in reversed(rows) if row.name.endswith(" 4 bit"))]
    models = [
        ModelMetrics(
            row.name, row.perplexity, row.kl_divergence, row.top1_agreement, row.bytes,
            row.kl_by_position if row is not original else [],
        )
        for row in shown
    ]  # fmt: skip
    evaluation = Evaluation(
        f"{len(ids):,} held-out tokens of Python's standard library, windows of {WINDOW}",
        models,
        str(verdict((models[0].perplexity, models[1].perplexity), models[1].kl_divergence, [])),
    )  # fmt: skip
    quantized, _ = load(folder, dtype=torch.float32)
    continuations = [
        Answers(prompt, *(greedy_answer(model, tokenizer, prompt) for model in (base, quantized)))
        for prompt in PROMPTS
    ]
    return write_report(folder, evaluation=evaluation, answers=continuations)


def _table(rows: list[Row]) -> Table:
    table = Table(
        "model", "perplexity", "KL to original", "bits per weight", "size", "seconds",
        title="roundwise demo",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.name, f"{row.perplexity:.3f}", f"{row.kl_divergence:.5f}",
            f"{row.bits_per_weight:.2f}", format_size(row.bytes), f"{row.seconds:.1f}",
        )  # fmt: skip
    return table
