"""Every family: planned, quantized, verified, loaded, and as the table in the docs says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.convert import convert
from roundwise.errors import ConfigError
from roundwise.evaluation.report.facts import read_facts
from roundwise.evaluation.report.page import write_report
from roundwise.model.build import forward_kwargs
from roundwise.model.streamed import open_streamed_model
from roundwise.plan.plan import plan
from roundwise.verify import audit
from tests.helpers import windows
from tests.matrix.families import BEGIN, END, FAMILIES, row, settings

pytestmark = pytest.mark.matrix

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@torch.no_grad()
def output(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """What a checkpoint makes of some text, or of some noise if it listens."""
    model, _ = rw.load(folder, dtype=dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    if model.main_input_name == "input_ids":
        return first(model(**forward_kwargs(model, torch.tensor(windows(seed=9)))))
    noise = torch.randn(1, 16, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(windows(1, seed=9))
    return first(model(**{model.main_input_name: noise, "decoder_input_ids": ids}))


def first(answer: Any) -> torch.Tensor:
    return answer.logits if hasattr(answer, "logits") else answer[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    config = settings(family)
    model, out, dense = tmp_path / "model", tmp_path / "out", tmp_path / "dense"
    family.make().save_pretrained(model)
    planned = plan(open_streamed_model(model), config, samples=4, seq_len=32)
    assert planned.problems == []
    texts = {"calibration": windows(), "samples": 4, "seq_len": 32, "batch_size": 2}
    if family.why_not:
        with pytest.raises(ConfigError, match=family.why_not):
            rw.quantize(model, out, config.merged({"method": "gptq"}), **texts)
    result = rw.quantize(model, out, config, **texts)
    assert {layer["name"] for layer in result.layers} == {m.name for m in planned.modules if m.bits}
    assert result.bytes_after == planned.bytes_after
    assert not any(layer["fallback"] for layer in result.layers)
    assert audit(out, against=Checkpoint(model)).failures == []
    page = write_report(out).read_text(encoding="utf-8")
    assert all(cell.worst["name"] in page or f"{cell.block}.{cell.kind}" in page
               for cell in read_facts(out).cells)  # fmt: skip
    convert(out, dense, "dense", dtype=torch.float32)
    # In float64 weights are decoded; kernels for float32 keep to 1e-3, on some processors closer.
    near = 1e-4 if family.exact == torch.float64 else 1e-3
    torch.testing.assert_close(
        output(out, family.exact), output(dense, family.exact), rtol=near, atol=near
    )
    assert row(name, family, model) in PAGE.read_text(encoding="utf-8")


def test_the_page_has_no_other_families() -> None:
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    listed = [
        line.split("|")[1].strip()
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith(("|--", "| family"))
    ]
    assert listed == [*FAMILIES]
    assert len(listed) > 80
