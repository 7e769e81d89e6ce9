"""The GPU benchmark says what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels_gpu.py"


def test_ends_with_2_where_there_is_no_device() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, SCRIPT], env=hidden, capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr
