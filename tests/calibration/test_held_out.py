"""Batches are held out while the correction is fitted, confirm a part of it, and are used in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import roundwise as rw
from roundwise.calibration.held_out import held_out_batches, windows_per_batch
from roundwise.forward.input_groups import InputGroup
from roundwise.model.streamed import open_streamed_model
from tests.conftest import BEST, QUICK
from tests.helpers import Stop, batches, contents, run_blocks, stop_after, windows


def quantize(model: Path, out: Path, **changes: Any) -> rw.QuantizeResult:
    settings = {"config": BEST, "calibration": windows(16), "samples": 16, "seq_len": 32}
    return rw.quantize(model, out, **{**settings, **changes})


@pytest.mark.parametrize(
    ("count", "numbers"),
    [(1, set()), (2, {1}), (5, {4}), (8, {7}), (9, {7}), (16, {7, 15}), (17, {7, 15})],
)
def test_every_eighth_batch_is_held_out(count: int, numbers: set[int]) -> None:
    assert held_out_batches(BEST, count) == numbers
    assert held_out_batches(rw.QuantizeConfig(recipe="textbook"), count) == set()


@pytest.mark.parametrize(
    ("samples", "batch_size", "expected"),
    [(128, 8, 8), (64, 8, 8), (63, 8, 7), (16, 8, 2), (9, 8, 1), (3, 8, 1), (1000, 4, 4)],
)
def test_batches_are_small_enough_for_eight(samples: int, batch_size: int, expected: int) -> None:
    assert windows_per_batch(samples, batch_size) == expected


@pytest.mark.parametrize("mode", ["true_sequential", "block"])
def test_parts_are_recorded_and_all_tokens_count(llama: Path, tmp_path: Path, mode: Any) -> None:
    result = quantize(llama, tmp_path / "out", mode=mode)
    for layer in result.layers:
        assert layer.tokens == 16 * 32
        if layer.name.startswith("model.layers.0.self_attn") and "o_proj" not in layer.name:
            # Its input has no errors yet: there is nothing to correct, or nothing that is confirmed.
            assert not layer.confirmed_drift
        else:
            assert layer.confirmed_drift is not None and 0 <= layer.confirmed_drift <= 1
    assert len({layer.confirmed_drift for layer in result.layers}) > 5


def test_textbook_corrects_nothing(llama: Path, tmp_path: Path) -> None:
    result = quantize(llama, tmp_path / "out", config=QUICK)
    assert not any("confirmed_drift" in layer for layer in result.layers)


def test_one_window_alone_confirms_nothing(llama: Path, tmp_path: Path) -> None:
    result = quantize(llama, tmp_path / "one", calibration=windows(1), samples=1)
    assert {layer.get("confirmed_drift", 0.0) for layer in result.layers} == {0.0}
    uncorrected = BEST.merged({"alpha": 0.0, "beta": 0.0})
    quantize(llama, tmp_path / "two", calibration=windows(1), samples=1, config=uncorrected)
    for name, data in contents(tmp_path / "one").items():
        if name.endswith(".safetensors"):
            assert contents(tmp_path / "two")[name] == data


def test_held_out_batches_are_summed_separately(llama: Path) -> None:
    rows = windows(4)
    seen: list[tuple[int, int]] = []

    def solve(group: InputGroup) -> None:
        assert group.hessian is not None
        seen.append((group.hessian.tokens, group.held.hessian.tokens if group.held else 0))  # type: ignore[union-attr]

    streamed = open_streamed_model(llama)
    for _ in run_blocks(streamed, batches(rows, 1), solve, held_out=frozenset([3])):
        pass
    assert set(seen) == {(96, 32)}


def test_a_stopped_run_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        quantize(llama, tmp_path / "out", progress=stop_after(11))
    quantize(llama, tmp_path / "out")
    quantize(llama, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("value", [-1, 11, "much", "auto", None, float("nan")])
def test_dampings_that_are_refused(value: Any) -> None:
    with pytest.raises(
        rw.errors.ConfigError, match=r"damp_percent=.*must be a number from 0 to 10"
    ):
        rw.QuantizeConfig(damp_percent=value)
