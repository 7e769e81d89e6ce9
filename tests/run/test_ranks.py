"""Several ranks share a run: the result equals that of one process, and a broken run resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.inference.load import load
from roundwise.verify import audit
from tests.helpers import Commands, Stop, contents, journal_blocks, stop_after, windows
from tests.run.ranks_script import exact_sums, quantize

#: Together the cases cover everything that is summed, split or decided by one rank.
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"bits": 3}, {}),
    ("llama", {"sym": False, "desc_act": True, "damp_percent": 0.02}, {"mode": "block"}),
    ("gpt2", {"recipe": "textbook"}, {"batch_size": 1}),
    ("mixtral", {"expert_tokens": 8}, {}),
    ("mixtral", {"experts": "all"}, {"mode": "block"}),
    ("llama", {"method": "rtn"}, {}),
]
OPTIONS = {"samples": 7, "seq_len": 32, "batch_size": 2}


@contextmanager
def torchrun(script: list[str], **more: Any) -> Iterator[subprocess.Popen[str]]:
    """Two ranks on this machine."""
    with subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            *script,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, **more,
    ) as running:  # fmt: skip
        try:
            yield running
        finally:
            running.kill()


def calibration(settings: dict[str, Any]) -> dict[str, Any]:
    return {} if settings.get("method") == "rtn" else {"calibration": windows(7)}


@pytest.fixture(scope="module")
def together(
    folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Runs all cases, a half-finished run and an impossible one with two ranks.

    Returns the output folders, and what each rank printed.
    """
    scratch = tmp_path_factory.mktemp("together")
    cases = [
        {
            "model": str(folder_of(name)), "out": str(scratch / str(i)), "settings": settings,
            "options": {**OPTIONS, **calibration(settings), **options},
        }
        for i, (name, settings, options) in enumerate(CASES)
    ]  # fmt: skip
    # One more resumes what a single process has begun,
    half = {**cases[0], "out": str(scratch / "half")}
    with pytest.raises(Stop):
        quantize(**{**half, "options": {**half["options"], "progress": stop_after(8)}})
    assert journal_blocks(scratch / "half") == [0]
    # and one has more ranks than batches.
    too_small = {
        **cases[0],
        "out": str(scratch / "no"),
        "options": {**cases[0]["options"], "samples": 1},
    }
    (scratch / "cases.json").write_text(json.dumps([*cases, half, too_small]))
    script = Path(__file__).with_name("ranks_script.py")
    with torchrun([str(script), str(scratch / "cases.json")], cwd=script.parents[2]) as running:
        _, stderr = running.communicate(timeout=300)
    assert running.returncode == 0, stderr
    printed = [json.loads((scratch / f"cases.json.{rank}").read_text()) for rank in range(2)]
    return [Path(case["out"]) for case in cases], printed


@pytest.mark.sampled(2)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_ranks_give_the_result_of_one(
    number: int,
    together: tuple[list[Path], list[dict[str, Any]]],
    folder_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    name, settings, options = CASES[number]
    alone = quantize(
        str(folder_of(name)), str(tmp_path / "out"), settings,
        {**OPTIONS, **calibration(settings), **options},
    )  # fmt: skip
    out = together[0][number]
    one, two = contents(tmp_path / "out"), contents(out)
    assert one.pop("roundwise.json") != two.pop("roundwise.json")  # it records the number of ranks
    assert one == two
    assert audit(out).failures == []
    manifest = json.loads((out / "roundwise.json").read_text())
    assert manifest["platform"]["ranks"] == 2
    for printed in together[1]:  # every rank returns the result
        result = printed["cases"][number]
        assert result["experts"] == [dict(module) for module in alone.experts]
        for layer, theirs in zip(alone.layers, result["layers"], strict=True):
            mine, figures = layer.as_json(), ("relative_error", "weight_error", "confirmed_drift")
            assert _figures(theirs) == pytest.approx(_figures(mine), rel=1e-4)
            assert {k: v for k, v in theirs.items() if k not in figures} == {
                k: v for k, v in mine.items() if k not in figures
            }


def _figures(layer: dict[str, Any]) -> list[float]:
    """The figures of a layer whose sums two ranks add in another order."""
    errors = [layer["relative_error"] or 0.0, layer["weight_error"]]
    return [*errors, layer.get("confirmed_drift") or 0.0]


def test_two_ranks_resume_the_run_of_one_process(
    together: tuple[list[Path], list[dict[str, Any]]],
) -> None:
    whole = together[0][0]
    one, two = contents(whole), contents(whole.with_name("half"))
    del one["roundwise.json"], two["roundwise.json"]
    assert one == two


def test_too_many_ranks_are_refused(together: tuple[list[Path], list[dict[str, Any]]]) -> None:
    for printed in together[1]:
        error = printed["cases"][-1]["error"]
        assert error.startswith("ConfigError: 2 ranks cannot share 1 batches")
    assert not together[0][0].with_name("no").exists()


def test_collectives(together: tuple[list[Path], list[dict[str, Any]]]) -> None:
    for rank, printed in enumerate(together[1]):
        tools = printed["collectives"]
        assert tools["rank"] == rank
        assert tools["broadcast"] == ["of", 0]
        assert tools["gathered"] == [{"rank": 0, "long": ""}, {"rank": 1, "long": "x" * 100}]
        assert tools["max"] == [1, 0]
        assert tools["sum"] == [2.0, 1.0]
        assert tools["rows"] == torch.arange(15.0).view(5, 3).tolist()
        assert tools["one row"] == [[1, 1]]
        assert tools["shard"] == [[[0, "a"], [2, "c"], [4, "e"]], [[1, "b"], [3, "d"]]][rank]


@pytest.mark.slow
def test_errors_change_little_with_sums_in_float64(tiny: Path, tmp_path: Path) -> None:
    """The other tests sum in float64; float32 must give similar errors."""
    errors = []
    for name in ("a", "b"):
        out = tmp_path / name
        config = rw.QuantizeConfig(bits=3)
        arguments: Any = (tiny, out, config, windows(8))
        if name == "b":
            with exact_sums():
                result = rw.quantize(*arguments, **OPTIONS)
        else:
            result = rw.quantize(*arguments, **OPTIONS)
        errors.append([layer["relative_error"] for layer in result.layers])
    assert errors[1] == pytest.approx(errors[0], rel=0.2)
    assert sum(errors[1]) == pytest.approx(sum(errors[0]), rel=0.02)


def _child(pid: int, rank: int) -> int:
    """The process of a rank, among torchrun's children."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError("no such rank")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_a_killed_rank_ends_the_job_and_finished_blocks_are_kept(
    tiny: Path, text: Path, commands: Commands, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [
        "quantize", str(tiny), str(out), "--calibration", str(text), "--samples", "32",
        "--seq-len", "256", "--batch-size", "4", "--recipe", "textbook",
    ]  # fmt: skip
    with torchrun(["-m", "roundwise", *command]) as running:
        deadline = time.monotonic() + 120
        while not (out / ".roundwise").exists() or len(journal_blocks(out)) < 2:
            assert time.monotonic() < deadline
            assert running.poll() is None, running.communicate()
            time.sleep(0.02)
        os.kill(_child(running.pid, 1), signal.SIGKILL)
        _, stderr = running.communicate(timeout=60)  # no hang
    assert running.returncode != 0
    assert "another rank has ended" in stderr or "SIGKILL" in stderr
    assert not (out / "config.json").exists()
    assert len(journal_blocks(out)) >= 2
    done = commands.run(*command)
    assert done.code == 0, done.stderr
    assert audit(out).failures == []
    # The result is close to the original model.
    base, quantized = (load(folder, dtype=torch.float32)[0] for folder in (tiny, out))
    ids = torch.tensor(windows(2))
    with torch.no_grad():
        error = (base(ids).logits - quantized(ids).logits).square().mean()
        assert error < 0.1 * base(ids).logits.var()


def test_bad_input_is_reported_once(tiny: Path, tmp_path: Path) -> None:
    command = ["quantize", str(tiny), str(tmp_path / "out"), "--bits", "9"]
    with torchrun(["-m", "roundwise", *command, "--calibration", "python-stdlib"]) as running:
        _, stderr = running.communicate(timeout=120)
    assert running.returncode != 0
    assert stderr.count("error: ") == 1
    assert "bits" in next(line for line in stderr.splitlines() if line.startswith("error: "))
