"""`damp_percent=auto`: damping is chosen on held-out batches; then all batches are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.core.held_out_damping import DAMPINGS
from roundwise.errors import CalibrationError, ConfigError, OutputError
from roundwise.forward.input_groups import InputGroup
from roundwise.model.streamed import open_streamed_model
from roundwise.run.held_out_damping import held_out_batches
from tests.conftest import BEST, QUICK
from tests.helpers import QKV, Commands, Stop, batches, contents, run_blocks, stop_after, windows

AUTO = BEST.merged({"damp_percent": "auto"})


def quantize(model: Path, out: Path, **changes: Any) -> rw.QuantizeResult:
    settings = {"config": AUTO, "calibration": windows(), "samples": 4, "seq_len": 32}
    return rw.quantize(model, out, **{**settings, "batch_size": 1, **changes})


@pytest.mark.parametrize(
    ("count", "numbers"), [(2, {1}), (5, {4}), (8, {7}), (9, {7}), (16, {7, 15}), (17, {7, 15})]
)
def test_every_eighth_batch_is_held_out(count: int, numbers: set[int]) -> None:
    assert held_out_batches(AUTO, count) == numbers
    assert held_out_batches(BEST, count) == set()


def test_a_single_batch_cannot_be_held_out(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"only one: use a smaller --batch-size"):
        quantize(llama, tmp_path / "out", batch_size=8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["true_sequential", "block"])
def test_the_damping_with_the_lowest_loss_is_chosen_and_recorded(
    llama: Path, tmp_path: Path, mode: Any
) -> None:
    result = quantize(llama, tmp_path / "out", mode=mode)
    for layer in result.layers:
        losses = layer["damp_losses"]
        assert [float(damping) for damping in losses] == list(DAMPINGS)
        assert layer["damp_percent"] == float(min(losses, key=losses.get))
        assert layer["tokens"] == 128  # the held-out tokens are used too
    # Linears of one input share the choice.
    chosen = {layer["name"]: layer["damp_losses"] for layer in result.layers}
    assert chosen["model.layers.1.self_attn.q_proj"] == chosen["model.layers.1.self_attn.v_proj"]
    assert chosen["model.layers.1.self_attn.q_proj"] != chosen["model.layers.1.mlp.down_proj"]


def test_the_chosen_damping_gives_the_result_of_a_fixed_one(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With one damping to choose from, auto is that damping: the same codes from all tokens.
    monkeypatch.setattr("roundwise.core.held_out_damping.DAMPINGS", (0.03,))
    auto = quantize(llama, tmp_path / "auto")
    given = quantize(llama, tmp_path / "given", config=BEST.merged({"damp_percent": 0.03}))
    for index, (a, b) in enumerate(zip(auto.layers, given.layers, strict=True)):
        assert a["damp_percent"] == b["damp_percent"] == 0.03
        assert "damp_losses" not in b
        if index < len(QKV):
            assert a["relative_error"] == pytest.approx(b["relative_error"], rel=0.001)
    # Moments of two parts are rounded differently, so rounding ties may go the other way and change the
    # inputs of later layers. The total error is the same.
    total = [sum(layer["relative_error"] for layer in run.layers) for run in (auto, given)]
    assert total[0] == pytest.approx(total[1], rel=0.05)


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


def test_a_run_with_a_fixed_damping_does_not_resume_it(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        quantize(llama, tmp_path / "out", progress=stop_after(8))
    with pytest.raises(OutputError, match=r"differs in config\.damp_percent \(auto -> 0\.01\)"):
        quantize(llama, tmp_path / "out", config=BEST)


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_methods_without_damping_hold_no_batch_out(
    method: str, llama: Path, tmp_path: Path
) -> None:
    config = QUICK.merged({"damp_percent": "auto", "method": method})
    result = quantize(llama, tmp_path / "out", config=config, batch_size=8)
    assert not any("damp_losses" in layer for layer in result.layers)


def test_with_scales(llama: Path, tmp_path: Path) -> None:
    result = quantize(llama, tmp_path / "out", config=AUTO.merged({"prescale": "awq"}))
    assert all(layer["damp_losses"] for layer in result.layers)
    assert any(layer["prescale"] for layer in result.layers)


@pytest.mark.parametrize("value", [-1, 11, "much", None, float("nan")])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"damp_percent=.*must be auto, or a number from 0 to 10"):
        rw.QuantizeConfig(damp_percent=value)


def test_from_the_command_line(
    commands: Commands, text_model: Path, text: Path, tmp_path: Path
) -> None:
    ended = commands.run(
        "quantize", text_model, tmp_path / "out", "--calibration", text, "--group-size", 32,
        "--samples", 2, "--seq-len", 32, "--batch-size", 1, "--damp-percent", "auto", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.stderr
    assert {layer["damp_percent"] for layer in ended.json["layers"]} <= set(DAMPINGS)
    settings = Checkpoint(tmp_path / "out").config["quantization_config"]
    assert "damp_percent" not in settings  # readers expect a number
    assert settings["meta"]["damp_percent"] == "auto"
