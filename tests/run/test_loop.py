"""A run: failing file operations, resumed timings, errors of hidden states, prefetching."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.checkpoint import sharding
from roundwise.errors import CheckpointError, RoundwiseError, RunError
from roundwise.inference.load import load
from roundwise.model.streamed import StreamedModel
from roundwise.run import block_solver
from roundwise.system.hub import bundled_model
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

    def step(self, operation: str) -> None:
        self.count += 1
        self.log.append(operation)
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


def quantize(model: Path, out: Path, **options: Any) -> rw.QuantizeResult:
    return rw.quantize(model, out, QUICK, windows(), samples=4, seq_len=32, **options)


@pytest.mark.slow
def test_each_file_operation_fails_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "SHARD_BYTES", 35_000)  # four shards
    faults = Faults(monkeypatch)
    quantize(llama, tmp_path / "whole")
    whole, operations = contents(tmp_path / "whole"), faults.count
    assert len([name for name in whole if name.endswith(".safetensors")]) == 4
    assert operations > 100
    for number in range(1, operations + 1):
        out = tmp_path / f"{number}"
        faults.arm(number, errno.EIO if number % 2 else errno.ENOSPC)
        try:
            quantize(llama, out)
        except RoundwiseError as error:
            failed: str | None = str(error)
        else:
            failed = None
        failure = f"operation {number}, {faults.log[number - 1]}: {failed}"
        faults.arm(-1)
        if (out / "config.json").exists():
            # At most the cleanup failed: the checkpoint is complete.
            assert audit(out).failures == [], failure
        else:
            assert failed, failure
            with pytest.raises(CheckpointError):
                rw.load(out)
        quantize(llama, out)
        assert contents(out) == whole, failure


@pytest.mark.slow
def test_each_file_operation_of_a_restart_of_an_unfinished_run_fails_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However far the folder was emptied, the next run starts again or resumes; it asks for nothing.
    faults = Faults(monkeypatch)
    quantize(llama, tmp_path / "whole")
    whole, begun = contents(tmp_path / "whole"), tmp_path / "begun"
    with pytest.raises(Stop):
        quantize(llama, begun, progress=stop_after(8))
    for number in range(1, 100):
        out = Path(shutil.copytree(begun, tmp_path / f"{number}"))
        faults.arm(number, errno.EIO)
        with suppress(RoundwiseError):  # none if it was a no-op, such as mkdir
            quantize(llama, out, restart=True)
        failed = faults.log[number - 1]
        faults.arm(-1)
        quantize(llama, out)
        assert contents(out) == whole, f"operation {number}, {failed}"
        if failed == "open journal.jsonl":  # from there on it is a run like any other
            break
    assert number > 4


def test_each_file_operation_of_a_restart_fails_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Up to the journal: from there on it is a run like any other.
    faults = Faults(monkeypatch)
    quantize(llama, tmp_path / "whole")
    whole, out = contents(tmp_path / "whole"), tmp_path / "out"

    def restart() -> None:
        quantize(llama, out, restart=True)

    quantize(llama, out)
    faults.arm(-1)
    restart()
    begun = next(i for i, step in enumerate(faults.log) if step == "open journal.jsonl")
    assert faults.log[:begun].count("unlink") > len(whole)
    for number in range(1, begun + 1):
        faults.arm(number, errno.EIO)
        with pytest.raises(RoundwiseError):
            restart()
        failure = f"operation {number}, {faults.log[number - 1]}"
        faults.arm(-1)
        if (out / "config.json").exists():
            assert audit(out).failures == [], failure
        quantize(llama, out)
        assert contents(out) == whole, failure


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_run_resumes_after_running_out_of_memory(
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


def test_a_clock_that_jumps_does_not_matter(
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[list[int]]]:
    """The bundled model in float32, its quantized checkpoint, and the calibration windows."""
    scratch = tmp_path_factory.mktemp("made")
    source, out = scratch / "source", scratch / "out"
    load(bundled_model(), dtype=torch.float32)[0].save_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(500, (8, 48), generator=generator).tolist()
    rw.quantize(source, out, rw.QuantizeConfig(bits=3), rows, batch_size=1, seq_len=48)
    return source, out, rows


@pytest.mark.slow
def test_depth_errors_equal_those_of_the_loaded_models(
    made: tuple[Path, Path, list[list[int]]],
) -> None:
    source, out, rows = made
    blocks = json.loads((out / "roundwise.json").read_text())["blocks"]
    states = []
    for folder in (source, out):
        model = load(folder, dtype=torch.float32)[0]
        with torch.no_grad():
            hidden = model(torch.tensor(rows), output_hidden_states=True).hidden_states
        states.append([h.double() for h in hidden])
    assert [block["name"] for block in blocks] == [f"model.layers.{i}" for i in range(6)]
    # All but the last, to which transformers applies the final norm.
    for block, then, now in zip(blocks[:-1], states[0][1:-1], states[1][1:-1], strict=True):
        expected = float((now - then).square().sum() / then.square().sum())
        assert block["depth_error"] == pytest.approx(expected, rel=1e-3)


def test_timings_add_up_over_a_resumed_run(
    made: tuple[Path, Path, list[list[int]]], tmp_path: Path
) -> None:
    source, whole, rows = made

    def stop(progress: rw.Progress) -> None:
        if progress.block == 2 and progress.layer is None:
            raise KeyboardInterrupt

    arguments: Any = (source, tmp_path / "out", rw.QuantizeConfig(bits=3), rows)
    with pytest.raises(rw.RoundwiseError, match="3 of 6 blocks"):
        rw.quantize(*arguments, batch_size=1, seq_len=48, progress=stop)
    result = rw.quantize(*arguments, batch_size=1, seq_len=48)
    timings = json.loads((tmp_path / "out" / "roundwise-run.json").read_text())
    assert len(timings["blocks"]) == 6
    assert timings["seconds"] == pytest.approx(sum(timings["phases"].values()))
    assert timings["phases"]["solve"] > result.phases["solve"] > 0
    assert result.seconds == pytest.approx(sum(result.phases.values()), rel=0.05)
    assert contents(tmp_path / "out") == contents(whole)


def test_the_next_block_is_read_while_one_runs(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[int] = []
    monkeypatch.setattr(StreamedModel, "prefetch", lambda _, index: ahead.append(index))
    blocks = []
    config = rw.QuantizeConfig(method="rtn", group_size=32)
    rw.quantize(
        llama, tmp_path, config, progress=lambda step: blocks.append((step.block, ahead[-1]))
    )
    assert blocks
    assert all(later == block + 1 for block, later in blocks)
