"""NaN and infinity in what is carried over are named with every recipe, before the run begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import roundwise as rw
from roundwise.checkpoint.reader import read_header
from roundwise.errors import CheckpointError
from roundwise.model.finite import first_not_finite
from tests.helpers import windows

RECIPES: dict[str, dict[str, Any]] = {
    "best": {}, "textbook": {"recipe": "textbook"}, "rtn": {"method": "rtn"},
    "rotated": {"rotate": True, "recipe": "textbook"}, "head": {"lm_head": True, "recipe": "textbook"},
}  # fmt: skip
PLACES = {
    "lm_head.weight": r"row 127", "model.norm.weight": "entry 63",
    "model.embed_tokens.weight": "row 127", "model.layers.1.input_layernorm.weight": "entry 63",
    "model.layers.0.self_attn.q_proj.bias": "entry 63",
}  # fmt: skip


def damaged(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", PLACES)
def test_it_is_named(
    name: str, recipe: str, copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_of("llama")
    damaged(folder, name, float("nan"))
    config = rw.QuantizeConfig(group_size=32, **RECIPES[recipe])
    # A head that is quantized is checked when it is solved.
    says = (
        rf"{name} holds NaN or infinity \({PLACES[name]}\)|lm_head: NaN or infinity in the weight"
    )
    with pytest.raises(rw.RoundwiseError, match=says) as error:
        rw.quantize(folder, tmp_path / "out", config, windows(), samples=4, seq_len=32)
    if (name, recipe) != ("lm_head.weight", "head"):
        assert isinstance(error.value, CheckpointError)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_that_is_quantized_is_named_too(
    recipe: str, copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, name = copy_of("llama"), "model.layers.1.mlp.up_proj"
    damaged(folder, f"{name}.weight", float("-inf"))
    config = rw.QuantizeConfig(group_size=32, **RECIPES[recipe])
    with pytest.raises(rw.RoundwiseError, match=f"{name}.* NaN or infinity"):
        rw.quantize(folder, tmp_path / "out", config, windows(), samples=4, seq_len=32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_positions(dtype: torch.dtype, tmp_path: Path) -> None:
    large = torch.full((40, 300_000), torch.finfo(dtype).max, dtype=dtype)  # its sum is infinite
    wrong = torch.zeros(40, 300_000, dtype=dtype)
    wrong[33, 7], wrong[39, 0] = float("nan"), float("inf")
    tensors = {"large": large, "wrong": wrong, "empty": torch.zeros(0, dtype=dtype)}
    save_file({**tensors, "ids": torch.arange(5)}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    found = {name: first_not_finite(info) for name, info in header.items()}
    assert found == {"large": None, "wrong": 33 * 300_000 + 7, "empty": None, "ids": None}
