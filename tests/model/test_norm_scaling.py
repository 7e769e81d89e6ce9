"""Scales moved from norms into the linears behind them do not change what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.transformed_view import TensorTransform, TransformedCheckpoint
from roundwise.errors import ConfigError
from roundwise.model.norm_scaling import ScalableNorm, scalable_norms
from roundwise.model.streamed import open_streamed_model
from tests.helpers import ARCHITECTURES, windows
from tests.model.test_rotate import whole

NAMES = pytest.mark.parametrize("name", ARCHITECTURES)
#: Of each architecture's groups, those that a norm feeds: all but the writers.
FED = {
    **dict.fromkeys(ARCHITECTURES, 2),
    "falcon": 1,  # attention and MLP share one
}


@NAMES
def test_all_linears_behind_norms_are_found(name: str, folder_of: Callable[[str], Path]) -> None:
    norms = scalable_norms(Checkpoint(folder_of(name)))
    streamed = open_streamed_model(folder_of(name))
    groups = {
        frozenset(f"{block.name}.{linear}" for linear in group)
        for block in streamed.blocks
        for group in ARCHITECTURES[name].groups
    }
    reader_groups = {frozenset(norm.readers) for norm in norms}
    assert reader_groups <= groups
    assert len(reader_groups) == len(norms) == FED[name] * len(streamed.blocks)


@NAMES
def test_logits_are_unchanged(name: str, folder_of: Callable[[str], Path]) -> None:
    source = Checkpoint(folder_of(name))
    transforms: dict[str, TensorTransform] = {}
    for norm in scalable_norms(source):
        s = torch.rand(64, dtype=torch.float64) * 3 + 0.1
        transforms |= norm.transforms(s)
        transforms |= {
            weight: TensorTransform(axis, gain=s) for weight, axis in norm.readers.values()
        }
    after = whole(TransformedCheckpoint(source, transforms))
    ids = torch.tensor(windows())
    with torch.no_grad():
        torch.testing.assert_close(
            after(input_ids=ids).logits, whole(source)(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )


def test_a_norm_that_another_operation_reads_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def routed(self: Any, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.gate_proj(x) * self.up_proj(x)
        return nn.functional.linear(hidden * x.mean(-1, keepdim=True), self.down_proj.weight)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", routed)
    with pytest.raises(
        ConfigError, match=r"cannot be prescaled: model\.layers\.0 also reads.*remove --prescale"
    ):
        scalable_norms(Checkpoint(llama))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_follow_exactly_from_the_stored_gains(dtype: torch.dtype, offset: float) -> None:
    weight = (torch.randn(64) - offset).to(dtype)
    weight[5] = -offset  # a gain of zero is not scaled
    norm = ScalableNorm("norm.weight", None, offset, {})
    wanted = torch.rand(64, dtype=torch.float64) * 4 + 0.2
    s = norm.storable_scales(weight, wanted)
    assert float(s[5]) == 1.0
    before = weight.double() + offset
    after = norm.transforms(s)["norm.weight"].apply(weight).to(dtype).double() + offset
    kept = before != 0
    torch.testing.assert_close((before / after)[kept], s[kept], rtol=1e-6, atol=0)
    assert float(after[5]) == 0.0
    # At most half a step of the type from the wanted gain; not scaled where that rounds to zero.
    ideal = before / wanted
    kind = torch.finfo(dtype)
    step = kind.eps * (ideal - offset).abs().clamp(min=kind.smallest_normal)
    unscaled = (s == 1.0) & (ideal.abs() <= step)
    assert bool((((after - ideal).abs() <= step / 2) | unscaled).all())
