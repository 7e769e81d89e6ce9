"""The GEMM layout of AWQ; `tests/published.py` packs weights in it, in another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from roundwise.checkpoint.dequantize.awq import AwqLayer, awq_layers, unpack
from roundwise.errors import CheckpointError, ConfigError
from tests.checkpoint.test_transformed_view import saved
from tests.helpers import raw
from tests.published import awq


def test_the_halves_of_a_word_alternate() -> None:
    """Channel 1 is in the upper half: AutoAWQ packs channels 0 2 4 6 1 3 5 7."""
    word = torch.tensor([[0x7531_6420]], dtype=torch.int32)
    assert unpack(word).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert unpack(torch.tensor([[-1]], dtype=torch.int32)).tolist() == [[15] * 8]


def layers(
    folder: Path, settings: dict[str, Any], **changed: torch.Tensor | None
) -> list[AwqLayer]:
    tensors = {**awq("a", torch.randn(64, 96).to(torch.bfloat16))[0]}
    tensors |= {f"a.{key}": value for key, value in changed.items()}
    folder.mkdir()
    kept = {name: T for name, T in tensors.items() if T is not None}
    return awq_layers(saved(folder, **kept).tensors, settings, "folder")


@pytest.mark.parametrize("size", [{"group_size": 32}, {"q_group_size": 32, "w_bit": 4}, {}])
def test_a_layer(size: dict[str, int], tmp_path: Path) -> None:
    W = torch.randn(64, 96).to(torch.bfloat16)
    tensors, dense = awq("a", W)
    (layer,) = awq_layers(saved(tmp_path, **tensors).tensors, {"version": "GEMM", **size}, "folder")
    assert (layer.name, layer.out_features, layer.in_features, layer.bits) == ("a", 64, 96, 4)
    assert raw(layer.read().dequantize(torch.bfloat16)) == raw(dense)


def test_what_contradicts_is_refused(tmp_path: Path) -> None:
    words = torch.zeros(96, 7, dtype=torch.int32)
    for index, (changes, settings, message) in enumerate(
        [
            ({"scales": None}, {}, "a lacks scales"),
            ({"qweight": words}, {}, r"a: qweight \[96, 7\].*do not fit together"),
            ({"qweight": words.long()}, {}, "a has tensors of types I64"),
            ({}, {"group_size": 64}, "3 groups of its 96 input channels.*group_size=64"),
        ]
    ):
        with pytest.raises(CheckpointError, match=message):
            layers(tmp_path / str(index), settings, **changes)
    with pytest.raises(ConfigError, match="layout gemm with 3 bits: only gemm with 4 bits"):
        layers(tmp_path / "bits", {"bits": 3})
    (layer,) = layers(tmp_path / "inf", {}, scales=torch.full((3, 64), torch.inf))
    with pytest.raises(CheckpointError, match="a has a scale that is not finite"):
        layer.read()
