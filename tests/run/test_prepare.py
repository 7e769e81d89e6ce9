"""`prepare` refuses input that cannot work before anything is written, and returns the plan of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.checkpoint.manifest import Fingerprint
from roundwise.checkpoint.reader import Checkpoint
from roundwise.config import CalibrationConfig, QuantizeConfig, RunConfig
from roundwise.errors import CheckpointError, ConfigError, StrictError
from roundwise.run.prepare import RunPlan, load_tokenizer, prepare
from tests.conftest import QUICK
from tests.helpers import windows


def plan_of(
    model: Path, out: Path, config: QuantizeConfig = QUICK, rows: Any = None, **options: Any
) -> RunPlan:
    """The plan of a run on four short windows."""
    rows = windows() if rows is None else rows
    calibration = CalibrationConfig(samples=4, seq_len=32, batch_size=2)
    return prepare(model, out, config, rows, calibration, RunConfig(**options))


def test_nothing_is_written_and_the_plan_is_frozen(llama: Path, tmp_path: Path) -> None:
    plan = plan_of(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert plan.calibration is not None and plan.calibration.record.tokens == 4 * 32
    assert plan.mode == "true_sequential"
    assert plan.given.model == str(llama) and plan.given.calibration is None
    assert plan.threads == torch.get_num_threads()
    assert plan.issues == ()
    with pytest.raises(FrozenInstanceError):
        plan.threads = 2  # type: ignore[misc]


def test_rounding_to_nearest_needs_no_calibration(llama: Path, tmp_path: Path) -> None:
    plan = plan_of(llama, tmp_path, QUICK.merged({"method": "rtn"}), rows=())
    assert plan.calibration is None
    assert plan.mode is None
    assert plan.fingerprint.mode == "none"


def test_the_fingerprint_depends_on_the_input_only(llama: Path, tmp_path: Path) -> None:
    first, again = (plan_of(llama, tmp_path / name).fingerprint for name in "ab")
    assert first == again
    assert first.config["dynamic"] == []
    changed = [
        plan_of(llama, tmp_path, QUICK.merged({"bits": 8})),
        plan_of(llama, tmp_path, rows=windows(seed=1)),
        plan_of(llama, tmp_path, mode="block"),
    ]
    for plan in changed:
        assert plan.fingerprint != first


def test_the_order_of_overrides_is_part_of_the_fingerprint(llama: Path, tmp_path: Path) -> None:
    rules: list[tuple[str, Any]] = [("k_proj", {"bits": 8}), ("proj", {"bits": 3})]
    configs = [
        QuantizeConfig(**{**QUICK.model_dump(), "dynamic": dict(each)})
        for each in (rules, rules[::-1])
    ]
    one, other = (plan_of(llama, tmp_path, config).fingerprint for config in configs)
    assert one.config["dynamic"] == [list(rule) for rule in rules]
    assert one != other


@pytest.mark.parametrize(
    ("requested", "mode"), [(None, "block"), ("true_sequential", "true_sequential")]
)
def test_a_resumed_run_keeps_the_mode_and_threads_of_the_first(
    requested: Any, mode: str, llama: Path, tmp_path: Path
) -> None:
    plan = plan_of(llama, tmp_path, mode=requested)
    assert plan.resuming(None) is plan
    resumed = plan.resuming(Fingerprint(mode="block", threads=7))
    assert (resumed.mode, resumed.threads) == (mode, 7)
    assert resumed.fingerprint.threads == 7


def test_skipping_all_layers_is_refused(llama: Path, tmp_path: Path) -> None:
    config = rw.QuantizeConfig(dynamic={"layers": None})
    with pytest.raises(ConfigError, match="every linear layer is skipped"):
        plan_of(llama, tmp_path, config)


def test_a_tokenizer_that_is_missing(llama: Path, tiny: Path) -> None:
    assert load_tokenizer(Checkpoint(tiny)).vocab_size == 4096
    with pytest.raises(CheckpointError, match="has no usable tokenizer"):
        load_tokenizer(Checkpoint(llama))


def test_windows_longer_than_the_model_takes_are_an_issue(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = folder_of("gpt2")  # takes 64 tokens
    with pytest.raises(
        StrictError, match="seq_len is 64, the longest text the model takes, not 65"
    ):
        rw.quantize(model, tmp_path / "out", QUICK, windows(), samples=4, seq_len=65, strict=True)


class TestRefused:
    """Input that cannot work leaves no files behind."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"config": rw.QuantizeConfig(group_size=128)},
                r"group_size=128 does not divide the input channels of 14 of 14 layers "
                r"\(such as model.layers.0.self_attn.q_proj, 64 x 64\): use --group-size 32$",
            ),
            ({"calibration": None}, "gptq needs calibration text"),
            ({"calibration": []}, "no tokens"),
            ({"calibration": [[]]}, "no tokens"),
            ({"calibration": [[3, 128]]}, "token id 128, but the model's vocabulary has 128"),
            ({"calibration": [[3, -1]]}, "token id -1"),
            ({"calibration": [[0.5, 1.5]]}, "strings or token ids, not fractions"),
            ({"samples": 0}, "samples=0"),
            ({"seq_len": 0}, "seq_len=0"),
            ({"batch_size": -1}, "batch_size=-1"),
            ({"max_memory": "lots"}, "'lots' is not a size"),
        ],
    )
    def test_settings(
        self, changes: dict[str, Any], message: str, llama: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(rw.RoundwiseError, match=message) as caught:
            rw.quantize(
                llama, tmp_path / "out",
                **{"config": QUICK, "calibration": windows(), "samples": 4, "seq_len": 32, **changes},
            )  # fmt: skip
        assert caught.value.exit_code == 2
        assert not (tmp_path / "out").exists()

    def test_text_for_a_model_without_a_tokenizer(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="has no usable tokenizer"):
            rw.quantize(llama, tmp_path / "out", QUICK, ["some text"])
        assert not (tmp_path / "out").exists()
