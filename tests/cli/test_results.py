"""The result of a run in words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from roundwise.cli.results import expert_coverage, print_result


def layer(name: str, error: float | None, fallback: str | None = None) -> Any:
    """Returns as much of a layer's record as is shown."""
    return SimpleNamespace(
        name=name, relative_error=error, fallback=fallback, bits=4, group_size=128
    )


def result(**values: Any) -> Any:
    """Returns as much of a run's result as is shown."""
    usual = {
        "layers": [layer("a.0.q", 0.001), layer("a.0.k", 0.003), layer("a.0.v", None, "zero")],
        "seconds": 12.34, "bits_per_weight": 4.254, "bytes_before": 10**9, "bytes_after": 3 * 10**8,
        "mode": "block", "peak_rss_bytes": 2 * 10**9, "peak_device_bytes": None, "device": "cpu",
        "experts": [], "warnings": [], "not_as_asked": [], "output": Path("out"),
    }  # fmt: skip
    return SimpleNamespace(**{**usual, **values})


def test_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(result(warnings=["few samples"], not_as_asked=["a.0.v: zero"]), Path("page.html"))
    assert capsys.readouterr().out.splitlines() == [
        "layers       3, 4.25 bits per weight",
        "size         1.0 GB -> 300.0 MB",
        "time         12.3 s, mode block",
        "peak memory  2.0 GB",
        "output error mean 2.00e-03, largest 3.00e-03 (a.0.k)",
        "note: few samples",
        "report: page.html",
        "verified, saved in out",
        "not as asked: a.0.v: zero",
    ]


def test_an_accelerator_and_no_errors(capsys: pytest.CaptureFixture[str]) -> None:
    run = result(layers=[layer("a", None)], device="cuda:0", peak_device_bytes=10**9)
    print_result(run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "peak memory  1.0 GB on cuda:0 and 2.0 GB"
    assert lines[4:] == ["verified, saved in out"]


def test_tokens_of_experts() -> None:
    modules: Any = [SimpleNamespace(tokens=[5, 1]), SimpleNamespace(tokens=[9, 2])]
    assert expert_coverage(modules) == (
        "4 experts in 2 layers: 1 to 9 calibration tokens each, median 5"
    )
    assert expert_coverage(modules[:1]).startswith("2 experts in 1 layer: 1 to 5")
