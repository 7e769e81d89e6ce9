"""The names of the package."""

from __future__ import annotations

import subprocess
import sys

import roundwise as rw


def test_dir_lists_the_public_names() -> None:
    assert {*dir(rw)} == {*rw.__all__, "__version__"}
    for name in dir(rw):
        assert getattr(rw, name) is not None


def test_windows_is_refused_in_one_sentence() -> None:
    script = "import sys; sys.platform = 'win32'; import roundwise"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stderr.endswith(
        "ImportError: roundwise needs Linux or macOS: on Windows, install it in WSL2\n"
    )
