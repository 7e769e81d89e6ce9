"""Blocks and linears are found by their shape, on the meta device, whatever the architecture."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from roundwise.checkpoint.hub import bundled_model
from roundwise.errors import CheckpointError, ConfigError
from roundwise.model.blocks import find_blocks, set_weight, weight_of
from roundwise.model.streamed import open_streamed_model
from tests.helpers import ARCHITECTURES, LLAMA, Architecture, linear_names, random_model, tensors_of

NAMES = pytest.mark.parametrize("name", ARCHITECTURES)


@NAMES
def test_blocks_and_linears(name: str, folder_of: Callable[[str], Path]) -> None:
    architecture: Architecture = ARCHITECTURES[name]
    streamed = open_streamed_model(folder_of(name))
    count = len(streamed.model.get_submodule(architecture.blocks))
    assert [b.name for b in streamed.blocks] == [f"{architecture.blocks}.{i}" for i in range(count)]
    found = {linear for block in streamed.blocks for linear in block.linears}
    assert found == set(linear_names(streamed.model, architecture))


@NAMES
def test_nothing_is_loaded_before_it_is_needed(name: str, folder_of: Callable[[str], Path]) -> None:
    model = open_streamed_model(folder_of(name)).model
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder_of(name))
    computed = dict(model.named_non_persistent_buffers())
    for buffer, value in plain.named_non_persistent_buffers():
        assert torch.equal(computed[buffer], value)


@NAMES
def test_every_tensor_of_the_checkpoint_is_somewhere(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    streamed = open_streamed_model(folder_of(name))
    parts = [streamed.block_tensors(i) for i in range(len(streamed.blocks))]
    parts.append(streamed.other_tensors())
    names = [tensor for part in parts for tensor in part]
    assert len(names) == len(set(names))
    assert set(names) == set(tensors_of(folder_of(name)))


@NAMES
def test_loading_gives_the_values_and_unloading_takes_them_back(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    streamed = open_streamed_model(folder_of(name))
    plain = dict(
        transformers.AutoModelForCausalLM.from_pretrained(folder_of(name)).named_parameters()
    )
    block = streamed.blocks[1]
    streamed.load(block.module, block.name)
    loaded = {f"{block.name}.{n}": p for n, p in block.module.named_parameters()}
    assert loaded
    assert all(torch.equal(value, plain[key]) for key, value in loaded.items())
    streamed.unload(block.module, block.name)
    assert all(parameter.device.type == "meta" for parameter in block.module.parameters())
    streamed.load_outside_blocks()
    head = streamed.model.get_output_embeddings().weight
    for key, parameter in streamed.model.named_parameters():
        inside = key.startswith(f"{ARCHITECTURES[name].blocks}.")
        if not inside and parameter is not head:
            assert torch.equal(parameter, plain[key])


def test_a_conv1d_is_seen_as_a_linear() -> None:
    conv = Conv1D(6, 4)
    assert weight_of(conv).shape == (6, 4)
    W = torch.randn(6, 4)
    set_weight(conv, W)
    assert torch.equal(weight_of(conv), W)
    x = torch.randn(2, 4)
    torch.testing.assert_close(conv(x), x @ W.T + conv.bias)


def test_the_weight_keeps_its_dtype() -> None:
    linear = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    set_weight(linear, torch.randn(4, 4))
    assert linear.weight.dtype == torch.bfloat16


def test_a_model_without_repeated_blocks() -> None:
    with pytest.raises(ConfigError, match="Sequential has no repeated blocks with linear layers"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(4, 4)))


def test_of_several_lists_the_heaviest_counts() -> None:
    model = torch.nn.Module()
    model.adapters = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(5))
    model.layers = torch.nn.ModuleList(
        torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(2)) for _ in range(3)
    )
    assert [block.name for block in find_blocks(model)] == ["layers.0", "layers.1", "layers.2"]
    assert list(find_blocks(model)[1].linears) == ["layers.1.0", "layers.1.1"]


def test_the_bundled_model_is_there() -> None:
    streamed = open_streamed_model(bundled_model())
    assert streamed.dtype == torch.bfloat16
    assert len(streamed.blocks) > 1


def test_another_shape_than_the_config_asks_for(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"vocab_size": 128', '"vocab_size": 96'))
    with pytest.raises(CheckpointError, match=r"has shape \[128, 64\].*asks for \[96, 64\]"):
        open_streamed_model(folder).load_outside_blocks()


class Doubling(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Product(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Chooser(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = super().forward(x)
        return scores, scores.topk(2).indices


def test_linears_that_are_none_and_small_ones_stay() -> None:
    model = torch.nn.Module()
    kinds = [torch.nn.Linear(64, 64), Product(64, 64), Doubling(64, 64), Chooser(64, 64)]
    small = [torch.nn.Linear(64, 31), torch.nn.Linear(16, 64)]
    model.layers = torch.nn.ModuleList([torch.nn.ModuleList([*kinds, *small])])
    (block,) = find_blocks(model)
    assert list(block.linears) == ["layers.0.0", "layers.0.1"]
    assert block.skipped_linears == {
        "layers.0.2": "Doubling computes more than a product",
        "layers.0.3": "Chooser computes more than a product",
        "layers.0.4": "it has fewer than 32 channels",
        "layers.0.5": "it has fewer than 32 channels",
    }


def in_memory(file: Path) -> np.ndarray:
    """Which pages of a file the system holds."""
    with file.open("rb") as handle:
        view = np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    found = np.zeros(-(-view.size // mmap.PAGESIZE), np.uint8)
    where, size = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.size)
    assert ctypes.CDLL(None).mincore(where, size, ctypes.c_void_p(found.ctypes.data)) == 0
    return found & 1


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_a_block_is_read_before_it_is_needed(tmp_path: Path) -> None:
    sizes = {**LLAMA, "hidden_size": 256, "intermediate_size": 1024}
    random_model(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    streamed = open_streamed_model(tmp_path)
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(file).mean() > 0.5:
        pytest.skip("needs a file system that forgets what it has read")
    pages = []
    for info in streamed.block_tensors(1).values():
        first, last = info.start // mmap.PAGESIZE, (info.start + info.nbytes - 1) // mmap.PAGESIZE
        pages += range(first, last + 1)
    before = in_memory(file)[pages].mean()
    streamed.prefetch(1)
    limit = time.monotonic() + 30
    while in_memory(file)[pages].mean() < 0.99 and time.monotonic() < limit:
        time.sleep(0.05)
    assert before < 0.5
    assert in_memory(file)[pages].mean() >= 0.99
    streamed.prefetch(2)  # there is none
