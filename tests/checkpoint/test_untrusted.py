"""A config may claim anything: what it claims is bounded before it costs anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from roundwise.checkpoint import untrusted
from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.untrusted import check_config, parse_model_dtype
from roundwise.errors import CheckpointError
from roundwise.model.streamed import build, open_streamed_model
from tests.helpers import ARCHITECTURES, edited_json


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 20_001},
        {"n_layer": 1e12},
        {"text_config": {"num_experts": 10**9}},
        {"vision": {"depths": [2, 2, 10**9]}},
    ],
)
def test_counts_that_no_model_has(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="no known model has more than 20000"):
        check_config(config)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 200}, {"vocab_size": 10**6}, {"max_position_embeddings": 10**7},
        {"expert_intermediate_size": 14_336}, {"block_size": 131_072}, {"layer_norm_eps": 1e-5},
        {"layer_types": ["full_attention"] * 80}, {"attn_implementation": "sdpa"},
        {"_name_or_path": "owner/name"}, {"use_expert_bias": True},
    ],
)  # fmt: skip
def test_what_models_have(config: dict[str, Any]) -> None:
    check_config(config)


def test_configs_of_all_small_models_pass(folder_of: Callable[[str], Path]) -> None:
    for name in ARCHITECTURES:
        check_config(Checkpoint(folder_of(name)).config)


@pytest.mark.parametrize(
    "value", ["owner/kernel", "owner/kernel@v1:f", {"": "owner/kernel"}, {"text_config": "a/b"}]
)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_code_from_the_hub_is_not_run(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match="code from the hub is not run"):
        check_config({"text_config": {key: value}})


def test_more_modules_than_the_files_could_fill(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    with edited_json(folder / "config.json") as config:
        config["num_hidden_layers"] = 9_999
    with pytest.raises(
        CheckpointError, match=r"more than \d+ modules, but the files hold \d+ tensors"
    ):
        open_streamed_model(folder)


def test_computed_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1, head_dim=4096,
    )  # fmt: skip
    build(config, torch.float32)
    monkeypatch.setattr(untrusted, "MAX_COMPUTED_BYTES", 4096)
    with pytest.raises(CheckpointError, match="GB of computed buffers"):
        build(config, torch.float32)


@pytest.mark.parametrize("name", ["float99", "zeros", "int64", "complex64", 7, {"a": 1}])
def test_what_is_no_floating_point_type(name: object) -> None:
    with pytest.raises(CheckpointError, match="must be a floating point type"):
        parse_model_dtype(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floating_point_types(dtype: torch.dtype) -> None:
    assert parse_model_dtype(dtype) == parse_model_dtype(str(dtype).removeprefix("torch.")) == dtype
