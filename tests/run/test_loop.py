"""Every file operation of a run fails once: nothing is lost, and nothing half-done looks finished."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import roundwise as rw
from roundwise.errors import CheckpointError, RoundwiseError, RunError
from roundwise.run import block_solver
from roundwise.verify import audit
from tests.conftest import QUICK
from tests.helpers import Stop, contents, journal_blocks, stop_after, windows


class Faults:
    """Counts the file operations of a run, and lets one of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.failing, self.number = 0, -1, errno.ENOSPC
        self.log: list[str] = []
        for owner, name in (
            (os, "fsync"), (os, "replace"), (os, "rename"), (os, "truncate"), (os, "unlink"),
            (os, "mkdir"), (Path, "unlink"), (Path, "mkdir"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.wrapped(name, getattr(owner, name)))
        real_open = Path.open

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set("wa") & set(mode):
                return real_open(path, mode, *args, **kwargs)
            self.step(f"open {path.name}")
            return Writing(real_open(path, mode, *args, **kwargs), self)

        monkeypatch.setattr(Path, "open", opened)

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            self.step(name)
            return real(*args, **kwargs)

        return operation

    def step(self, what: str) -> None:
        self.count += 1
        self.log.append(what)
        if self.count == self.failing:
            raise OSError(self.number, os.strerror(self.number))

    def arm(self, failing: int, number: int = errno.ENOSPC) -> None:
        """Lets the operation with this number, counted from now, fail."""
        self.count, self.failing, self.number = 0, failing, number
        self.log.clear()


class Writing:
    """An open file whose writes are counted."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self.file, self.faults = file, faults

    def write(self, data: Any) -> Any:
        self.faults.step("write")
        return self.file.write(data)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def quantize(model: Path, out: Path) -> rw.QuantizeResult:
    return rw.quantize(model, out, QUICK, windows(), samples=4, seq_len=32)


def test_each_file_operation_fails_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(monkeypatch)
    quantize(llama, tmp_path / "whole")
    whole, operations = contents(tmp_path / "whole"), faults.count
    assert operations > 50
    for number in range(1, operations + 1):
        out = tmp_path / f"{number}"
        faults.arm(number, errno.EIO if number % 2 else errno.ENOSPC)
        try:
            quantize(llama, out)
        except RoundwiseError as error:
            failed: str | None = str(error)
        else:
            failed = None
        what = f"operation {number}, {faults.log[number - 1]}: {failed}"
        faults.arm(-1)
        if (out / "config.json").exists():
            # Failed while cleaning up, if at all: what is there is whole.
            assert audit(out).failures == [], what
        else:
            assert failed, what
            with pytest.raises(CheckpointError):
                rw.load(out)
        quantize(llama, out)
        assert contents(out) == whole, what


def test_each_file_operation_of_a_restart_fails_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Up to where work begins: from there on it is a run like any other.
    faults = Faults(monkeypatch)
    quantize(llama, tmp_path / "whole")
    whole, out = contents(tmp_path / "whole"), tmp_path / "out"

    def restart() -> None:
        rw.quantize(llama, out, QUICK, windows(), samples=4, seq_len=32, restart=True)

    quantize(llama, out)
    faults.arm(-1)
    restart()
    begun = next(i for i, what in enumerate(faults.log) if what == "open journal.jsonl")
    assert faults.log[:begun].count("unlink") > len(whole)
    for number in range(1, begun + 1):
        faults.arm(number, errno.EIO)
        with pytest.raises(RoundwiseError):
            restart()
        what = f"operation {number}, {faults.log[number - 1]}"
        faults.arm(-1)
        if (out / "config.json").exists():
            assert audit(out).failures == [], what
        quantize(llama, out)
        assert contents(out) == whole, what


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_in_the_solver_is_named_and_can_be_gone_on_from(
    error: Exception, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(llama, tmp_path / "whole")
    real, calls = block_solver.solve, iter(range(100))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 10:  # in the second block
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(block_solver, "solve", failing)
    with pytest.raises(RunError, match="out of memory; finished blocks are kept"):
        quantize(llama, tmp_path / "out")
    assert journal_blocks(tmp_path / "out") == [0]
    monkeypatch.setattr(block_solver, "solve", real)
    quantize(llama, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_clock_that_jumps_changes_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(llama, tmp_path / "whole")
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 86400.0 * next(jumps))
    with pytest.raises(Stop):
        rw.quantize(
            llama, tmp_path / "out", QUICK, windows(), samples=4, seq_len=32, progress=stop_after(9)
        )
    quantize(llama, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
