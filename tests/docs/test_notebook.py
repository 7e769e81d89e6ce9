"""The example notebook runs from top to bottom, as a reader runs it."""

import json
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quantize.ipynb"


def code_cells() -> list[str]:
    """Returns the code of all cells."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_it_has_no_output_and_a_form_that_jupyter_reads():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len({*ids}) == len(ids)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_its_cells_run(tmp_path):
    cells = code_cells()
    assert len(cells) >= 5
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join(cells), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:roundwise", script],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    original, quantized = (
        float(line.split()[0]) for line in lines if line.endswith(("tiny-llama", "tiny-4bit"))
    )
    assert 10 < original < 60
    assert abs(quantized / original - 1) < 0.02
    assert "def read_file(path):" in done.stdout
    assert (tmp_path / "tiny-4bit" / "roundwise.json").exists()
