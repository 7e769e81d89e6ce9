"""lm-eval finds our model class by its name (tests/clients runs lm-eval's command line)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import roundwise as rw
from tests.evaluation.own_tasks import WARNINGS, write_tasks

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")
pytestmark = WARNINGS


def test_a_model_by_name(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import roundwise.evaluation.lm_eval_model  # noqa: F401  # registers the name
    from roundwise.evaluation.tasks import evaluate_tasks, scores_of

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path)
    result = lm_eval.simple_evaluate(
        model="roundwise", model_args=f"pretrained={tiny},dtype=float32", tasks=["own_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )  # fmt: skip
    model, tokenizer = rw.load(tiny, dtype=torch.float32)
    expected = evaluate_tasks(model, tokenizer, ["own_choice"], include_path=tmp_path)
    assert scores_of(result).scores == expected.scores


def test_a_quantized_checkpoint(tiny: Path, tmp_path: Path) -> None:
    from roundwise.evaluation.lm_eval_model import RoundwiseLM
    from roundwise.inference.quant_linear import QuantLinear

    rw.quantize(tiny, tmp_path / "out", rw.QuantizeConfig(method="rtn"))
    harness = RoundwiseLM(str(tmp_path / "out"), dtype="float32", device="cpu", batch_size=2)
    assert any(isinstance(module, QuantLinear) for module in harness.model.modules())
    assert harness.model.dtype == torch.float32
    assert harness.device == torch.device("cpu")
    assert harness.tokenizer.decode(harness.tok_encode("import os")) == "import os"


def test_the_default_device_of_lm_eval_falls_back_to_the_cpu(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from roundwise.evaluation.lm_eval_model import RoundwiseLM

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    harness = RoundwiseLM(str(tiny), dtype="float32", device="cuda:0")
    assert harness.device == torch.device("cpu")
    assert "the CPU is used instead of device cuda:0" in caplog.text


def test_the_harness_reads_it_with_its_own_class(tiny: Path, tmp_path: Path) -> None:
    """What `python -m roundwise.evaluation.lm_eval_model --model hf` does."""
    from lm_eval.models.huggingface import HFLM

    from roundwise.inference.quant_linear import QuantLinear

    rw.quantize(tiny, tmp_path / "out", rw.QuantizeConfig(method="rtn"))
    harness = HFLM(pretrained=str(tmp_path / "out"), device="cpu", dtype="float32")
    assert any(isinstance(module, QuantLinear) for module in harness.model.modules())
