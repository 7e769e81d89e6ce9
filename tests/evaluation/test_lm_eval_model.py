"""lm-eval finds our model class by its name (tests/clients runs lm-eval's command line)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import roundwise as rw
from tests.evaluation.own_tasks import WARNINGS, write_tasks

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'roundwise[eval]'")
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
