"""Weights and scales are found under the names of every tool; nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from roundwise.checkpoint.dequantize.find_scaled import find_scaled, has_scales
from roundwise.errors import CheckpointError
from tests.checkpoint.test_transformed_view import saved

F8, U8 = torch.float8_e4m3fn, torch.uint8


def test_tensors_that_are_not_weights_stay(tmp_path: Path) -> None:
    """Parameters may be called `scale`, and bytes may be masks."""
    tensors = {
        "a.weight": torch.zeros(32, 32, dtype=F8),
        "a.weight_scale": torch.ones(32, 1),
        "a.input_scale": torch.ones(()),
        "attn.k_scale": torch.ones(()),
        "attn_hc.scale": torch.ones(3),
        "norm.weight": torch.ones(32),
        "mask": torch.zeros(4, 4, dtype=U8),
        "table.codes": torch.zeros(4, 4, dtype=torch.int8),
    }
    found = find_scaled(saved(tmp_path, **tensors).tensors, torch.bfloat16, bytes_are="INT8")
    assert {*found.weights} == {"a.weight"}
    assert found.used == {"a.weight", "a.weight_scale", "a.input_scale", "attn.k_scale"}


def test_bytes_are_what_the_method_says(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.zeros(32, 32, dtype=torch.int8),
        "a.weight_scale": torch.ones(32, 1),
    }
    infos = saved(tmp_path, **tensors).tensors
    for kind, columns in (("INT8", 32), ("FP4", 64)):
        found = find_scaled(infos, torch.bfloat16, bytes_are=kind)
        assert found.weights["a.weight"].dense().shape == (32, columns)


def test_parameters_without_a_module_of_their_own(tmp_path: Path) -> None:
    tensors = {
        "experts.gate_up_proj": torch.zeros(2, 32, 64, dtype=F8),
        "experts.gate_up_proj_scale_inv": torch.ones(2, 1, 2),
        "experts.down_proj_blocks": torch.zeros(2, 32, 2, 16, dtype=U8),
        "experts.down_proj_scales": torch.full((2, 32, 2), 127, dtype=U8),
    }
    found = find_scaled(saved(tmp_path, **tensors).tensors, torch.bfloat16, bytes_are="FP4")
    shapes = {name: weight.dense().shape for name, weight in found.weights.items()}
    assert shapes == {"experts.gate_up_proj": (2, 32, 64), "experts.down_proj": (2, 64, 32)}
    assert found.used == {*tensors}


def test_missing_scales(tmp_path: Path) -> None:
    infos = saved(tmp_path, **{"a.weight": torch.zeros(32, 32, dtype=F8)}).tensors
    assert not has_scales(infos)
    with pytest.raises(
        CheckpointError, match=r"a\.weight is in FP8, but a\.weight_scale_inv is mis"
    ):
        find_scaled(infos, torch.bfloat16, bytes_are="INT8")
