"""Files of a model folder are not trusted: their size, links and claims are bounded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from roundwise.checkpoint import untrusted
from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.untrusted import (
    check_config,
    check_links,
    file_digest,
    file_state,
    parse_model_dtype,
    read_json,
)
from roundwise.errors import CheckpointError
from roundwise.model.build import build
from roundwise.model.streamed import open_streamed_model
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
def test_implausible_counts_are_refused(config: dict[str, Any]) -> None:
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
def test_plausible_settings_pass(config: dict[str, Any]) -> None:
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


def test_more_modules_than_tensors_is_refused(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    with edited_json(folder / "config.json") as config:
        config["num_hidden_layers"] = 9_999
    with pytest.raises(
        CheckpointError, match=r"more than \d+ modules, but the files hold \d+ tensors"
    ):
        open_streamed_model(folder)


def test_computed_buffers_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1, head_dim=4096,
    )  # fmt: skip
    build(config, torch.float32)
    monkeypatch.setattr(untrusted, "MAX_COMPUTED_BYTES", 4096)
    with pytest.raises(CheckpointError, match="GB of computed buffers"):
        build(config, torch.float32)


@pytest.mark.parametrize("name", ["float99", "zeros", "int64", "complex64", 7, {"a": 1}])
def test_other_types_are_refused(name: object) -> None:
    with pytest.raises(CheckpointError, match="must be a floating point type"):
        parse_model_dtype(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floating_point_types(dtype: torch.dtype) -> None:
    assert parse_model_dtype(dtype) == parse_model_dtype(str(dtype).removeprefix("torch.")) == dtype


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[1]", b"", b"[" * 100_000])
def test_what_is_not_a_json_object_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_a_huge_json_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "MAX_JSON", 1 << 20)
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 1 << 40)  # a sparse file: it takes no space on disk
    with pytest.raises(CheckpointError, match="larger than 1 MiB"):
        read_json(tmp_path / "config.json")


def test_a_changed_or_missing_file_has_another_state(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert file_state(path) is None
    path.write_text("a")
    before = file_state(path)
    assert file_state(path) == before
    os.utime(path, ns=(0, 0))
    assert file_state(path) != before
    assert file_digest(path) == hashlib.sha256(b"a").hexdigest()


def test_links_within_the_folder_are_allowed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a", "../b"):
        (folder / name).write_text(name)
    (folder / "inside").symlink_to("a")
    (folder / "outside").symlink_to("../b")
    check_links(folder, [folder / "a", folder / "inside"])
    with pytest.raises(CheckpointError, match=r"outside is a link to .*, outside the folder"):
        check_links(folder, [folder / "outside"])
