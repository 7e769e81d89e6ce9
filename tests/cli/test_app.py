"""The application: version, help, and errors as one sentence; nothing heavy is imported for --help."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import roundwise as rw
from roundwise.cli import app
from tests.helpers import Commands


def test_version(commands: Commands) -> None:
    ended = commands.run("--version")
    assert (ended.code, ended.stdout) == (0, f"roundwise {rw.__version__}\n")


def test_help_lists_the_commands(commands: Commands) -> None:
    ended = commands.run("--help")
    assert ended.code == 0
    for name in ("quantize", "inspect", "verify", "eval", "generate", "bench", "serve", "demo"):
        assert name in ended.stdout
        assert commands.run(name, "--help").code == 0


class TestModule:
    """`python -m roundwise`, really started: the other tests fork what is imported already."""

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "roundwise", *map(str, arguments)],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def test_help_does_not_wait_for_torch(self) -> None:
        code = (
            "import sys, runpy; sys.argv = ['roundwise', '--help']\n"
            "try: runpy.run_module('roundwise', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    def test_an_error_is_one_line(self, tmp_path: Path) -> None:
        ended = self.run("inspect", tmp_path)
        assert ended.returncode == 2
        assert ended.stderr.strip() == f"error: {tmp_path} has no config.json, so it is not a model"
        assert ended.stdout == ""


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENAMETOOLONG, 2), (errno.EACCES, 2), (errno.ENOTDIR, 2), (errno.EIO, 1), (errno.ENOSPC, 1)],
)  # fmt: skip
def test_errors_about_files_are_one_sentence(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number), "a\x1b[2J" * 100)

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == code
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "\x1b" not in printed and len(printed) < 200
    assert printed.rstrip().endswith(os.strerror(number))
