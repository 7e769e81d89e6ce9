"""Writes the table of all classes of models into a page of the docs.

python -m tests.matrix.table docs/families.md [PROCESSES]
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers

from tests.matrix.check import Row, last_line, run
from tests.matrix.tiny import class_names

#: Begins the note of a class that does not do what it should.
FAILS = "fails"
BEGIN, END = "<!-- classes -->", "<!-- end: classes -->"


def line(row: Row) -> str:
    """A line of the table."""
    notes = "; ".join(row.notes).replace("|", "\\|").replace("\n", " ")
    if not row.method:
        return f"| {row.name} | none |  |  | {notes} |"
    return f"| {row.name} | {row.method} | {row.linears} | {row.share:.0%} | {notes} |"


def kind(row: Row) -> str:
    """What came of a class, for the counts."""
    if row.method == "gptq":
        return "calibrated, at least 90%" if row.share >= 0.9 else "calibrated, less than 90%"
    if row.method:
        return "rounded only"
    return "failing" if row.notes[0].startswith(f"{FAILS}:") else "not quantized"


def lines(rows: list[Row]) -> Iterator[str]:
    """The counts and the table."""
    counts = Counter(map(kind, rows))
    yield f"{len(rows)} classes of transformers {transformers.__version__}: " + ", ".join(
        f"{count} {name}" for name, count in sorted(counts.items())
    )
    yield "\n| class | method | linear layers | of the blocks' weights | what stays, and why |"
    yield "|---|---|---|---|---|"
    yield from map(line, rows)


def run_in_folder(name: str) -> Row:
    """Runs a class in a folder of its own."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        try:
            return run(name, Path(folder))
        except Exception as error:  # the test of the class fails, the table says so
            return Row(name, notes=(f"{FAILS}: {last_line(error)}",))


def main(page: Path, processes: int) -> None:
    """Writes the table between the marks of a page."""
    with ProcessPoolExecutor(processes) as pool:
        rows = []
        for row in pool.map(run_in_folder, class_names()):
            print(line(row), file=sys.stderr, flush=True)
            rows.append(row)
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    table = "\n".join(lines(rows))
    page.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
