"""Issues: an error of a strict run, otherwise one of the last lines of a run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.checkpoint.manifest import LayerRecord
from roundwise.core.backends import cpp
from roundwise.errors import FallbackError, StrictError
from roundwise.model.fake_forward import CallTrace
from roundwise.model.streamed import open_streamed_model
from roundwise.plan import cost_model, memory
from roundwise.run import strict
from tests.conftest import QUICK
from tests.helpers import random_model, windows


def layer_record(name: str, **changes: Any) -> LayerRecord:
    """The record of a layer without issues, with some fields changed."""
    usual: dict[str, Any] = {
        "bits": 4, "group_size": 128, "relative_error": 0.01, "weight_error": 0.01,
        "damp_percent": 0.01, "damp_tried": [0.01], "tokens": 128, "fallback": None,
    }  # fmt: skip
    return LayerRecord(name=name, **{**usual, **changes})


def quantize(model: Path, out: Path, **changes: Any) -> rw.QuantizeResult:
    settings = {"config": QUICK, "calibration": windows(), "samples": 4, "seq_len": 32}
    return rw.quantize(model, out, **{**settings, **changes})


def with_patterns(**dynamic: Any) -> rw.QuantizeConfig:
    return rw.QuantizeConfig(**{**QUICK.model_dump(), "dynamic": dynamic})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 5}, "the calibration text gives only 4 of 5 windows"),
        ({"samples": 3}, "only the first 3 of 4 calibration items are used"),
        ({"seq_len": 31}, "4 of 4 calibration items are cut to seq_len=31"),
        ({"max_memory": 1000}, "expected to need"),
        ({"config": with_patterns(q_prj=None)}, "'q_prj' (--override, --skip) decides about no layer"),
        (
            {"config": with_patterns(self_attn={"bits": 8}, q_proj=None)},
            "'q_proj' (--override, --skip) decides about no layer",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_issues_known_beforehand_are_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(StrictError, match="not as asked, and --strict was given") as error:
        quantize(llama, tmp_path / "strict", strict=True, **changes)
    assert message in str(error.value)
    assert not (tmp_path / "strict").exists()
    result = quantize(llama, tmp_path / "out", **changes)
    assert any(message in line for line in result.not_as_asked)


def test_a_strict_run_without_issues(llama: Path, tmp_path: Path) -> None:
    result = quantize(llama, tmp_path / "out", strict=True)
    assert result.not_as_asked == []


def test_a_mode_that_only_the_memory_chose(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The memory of this process grows with every run, by more than the modes differ here.
    monkeypatch.setattr(memory, "resident_bytes", lambda: 500_000_000)
    # In so small a model it would be larger than everything else.
    monkeypatch.setattr(cost_model, "workspace", lambda _: 1)
    # With one batch, offloading saves nothing.
    needs = {"samples": 400, "calibration": windows(400), "batch_size": 400}
    least = {**needs, "max_memory": 1}  # otherwise freed memory is kept
    planned = quantize(llama, tmp_path / "wide", mode="true_sequential", **least)
    narrow = quantize(llama, tmp_path / "narrow", mode="block", **least)
    between = (planned.planned_peak_bytes + narrow.planned_peak_bytes) // 2
    for mode in ("true_sequential", "block"):
        roomy = quantize(llama, tmp_path / f"roomy-{mode}", mode=mode, **needs)
        assert roomy.not_as_asked == []
    with pytest.raises(StrictError, match="mode is block: true_sequential is expected to need"):
        quantize(llama, tmp_path / "out", max_memory=between, strict=True, **needs)
    quantize(llama, tmp_path / "out", max_memory=between, mode="block", strict=True, **needs)


def test_missing_native_code_is_an_issue_unless_it_was_switched_off(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # importlib finds no module if sys.modules has None: as if it had not been built.
    monkeypatch.setitem(sys.modules, "roundwise._native", None)
    cpp.load.cache_clear()
    try:
        with pytest.raises(StrictError, match="native code is not used"):
            quantize(llama, tmp_path / "out", strict=True)
        cpp.load.cache_clear()
        monkeypatch.setenv(cpp.VARIABLE, "off")
        assert quantize(llama, tmp_path / "off", strict=True).not_as_asked == []
    finally:
        cpp.load.cache_clear()


def test_weights_that_belong_to_no_linear_layer(tmp_path: Path) -> None:
    # A state-space model with a convolution as large as its projections.
    config = transformers.MambaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, conv_kernel=64, state_size=8
    )
    random_model(config).save_pretrained(tmp_path / "model")
    streamed = open_streamed_model(tmp_path / "model")
    small, line = strict.check_run(streamed, QUICK, CallTrace())
    assert "x_proj and 3 more stay dense: it has fewer than 32 channels" in small
    assert re.match(r"2\d% of the blocks' weights belong to no linear layer and stay dense", line)
    assert "mixer.conv1d.weight (8,192) and similar" in line
    # If it is requested, it is not an issue.
    assert strict.check_run(streamed, with_patterns(conv1d=None), CallTrace()) == [small]


class TestLayers:
    """Issues that show while a run works."""

    @pytest.fixture
    def silent(self, copy_of: Callable[[str], Path]) -> Path:
        """A model whose second MLP has only zeros as inputs."""
        folder = copy_of("llama")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.model.layers[1].post_attention_layernorm.weight.zero_()
        model.save_pretrained(folder)
        return folder

    def test_the_first_fallback_ends_a_strict_run(self, silent: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with pytest.raises(
            FallbackError, match=r"layers\.1\.mlp\.gate_proj: rounded to nearest: the"
        ):
            quantize(silent, out, strict=True)
        assert not (out / "config.json").exists()
        # The same command without --strict resumes; its result is refused by a strict one.
        result = quantize(silent, out)
        assert len(result.not_as_asked) == 3
        with pytest.raises(FallbackError, match=r"layers\.1\.mlp\.down_proj"):
            quantize(silent, out, strict=True)

    def test_a_fallback_in_a_block_that_an_earlier_run_finished(
        self, silent: Path, tmp_path: Path
    ) -> None:
        def stop(step: Any) -> None:
            if step.layer is None and step.block == 1:
                raise KeyboardInterrupt

        with pytest.raises(rw.errors.Interrupted):
            quantize(silent, tmp_path / "out", progress=stop)
        with pytest.raises(FallbackError, match=r"layers\.1\.mlp\.gate_proj"):
            quantize(silent, tmp_path / "out", strict=True)

    def test_raised_damping(self, llama: Path, tmp_path: Path) -> None:
        # One token gives a Hessian of rank one, which is indefinite without damping.
        config = QUICK.merged({"damp_percent": 0.0})
        options: dict[str, Any] = {"config": config, "calibration": [[5]], "samples": 1}
        with pytest.raises(FallbackError, match="damping raised to"):
            quantize(llama, tmp_path / "strict", strict=True, **options)
        assert "damping raised to" in quantize(llama, tmp_path / "out", **options).not_as_asked[0]

    def test_similar_layers_share_a_line(self) -> None:
        missed = {"fallback": "no token", "relative_error": None, "damp_tried": []}
        layers = [layer_record(f"model.layers.{i}.up_proj", **missed) for i in range(40)]
        assert strict.layer_issues([*layers, layer_record("head", **missed)]) == [
            "model.layers.*.up_proj (40 layers): rounded to nearest: no token",
            "head: rounded to nearest: no token",
        ]


def test_experts_with_few_tokens_share_a_line():
    layers = [
        layer_record(
            f"model.layers.0.mlp.experts.{expert}.up_proj",
            fallback=f"only {expert} of 128 calibration tokens were routed here",
        )
        for expert in range(3)
    ]
    (line,) = strict.layer_issues(layers)
    assert "(3 layers): only few of 128 calibration tokens" in line
    assert "nearest" not in line
