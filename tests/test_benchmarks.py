"""Tests that all benchmarks named in the documentation can be loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"
#: Runs everything except the code under `if __name__ == "__main__"`.
LOAD = """
import runpy, sys
for name in sys.argv[2:]:
    sys.path[0] = sys.argv[1]
    runpy.run_path(name, run_name="loaded")
    print(name)
"""


def test_all_can_be_loaded() -> None:
    scripts = sorted(str(path) for path in FOLDER.glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(FOLDER), *scripts],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == scripts
    assert len(scripts) > 10
