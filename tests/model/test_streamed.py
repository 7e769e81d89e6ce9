"""Weights are loaded block by block into a model on the meta device."""

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

from roundwise.checkpoint.reader import Checkpoint
from roundwise.model.streamed import open_streamed_model, unfused_checkpoint
from roundwise.system.hub import bundled_model
from tests.helpers import ARCHITECTURES, LLAMA, random_model, tensors_of
from tests.matrix.tiny import tiny_model

NAMES = pytest.mark.parametrize("name", ARCHITECTURES)


@NAMES
def test_nothing_is_loaded_before_it_is_needed(name: str, folder_of: Callable[[str], Path]) -> None:
    model = open_streamed_model(folder_of(name)).model
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder_of(name))
    computed = dict(model.named_non_persistent_buffers())
    for buffer, value in plain.named_non_persistent_buffers():
        assert torch.equal(computed[buffer], value)


@NAMES
def test_every_tensor_belongs_to_one_block_or_to_none(
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


def test_the_bundled_model_opens() -> None:
    streamed = open_streamed_model(bundled_model())
    assert streamed.dtype == torch.bfloat16
    assert len(streamed.blocks) > 1


def test_skipped_blocks_count_as_outside(llama: Path) -> None:
    streamed = open_streamed_model(llama)
    first, second = streamed.blocks
    inside = [streamed.block_tensors(index) for index in (0, 1)]
    streamed.skip_blocks([first])
    assert (streamed.blocks, streamed.skipped_blocks) == ([second], [first])
    assert streamed.block_tensors(0) == inside[1]
    assert inside[0].items() <= streamed.other_tensors().items()


def test_a_layer_gets_its_own_weight_where_files_share_one(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    fused = Checkpoint(folder_of("gpt_oss"))
    name = "model.layers.0.mlp.experts.3.up_proj"
    view = unfused_checkpoint(fused, {name}, lm_head=False)
    whole = fused.tensors["model.layers.0.mlp.experts.gate_up_proj"].read()
    assert torch.equal(view.tensors[f"{name}.weight"].read(), whole[3, :, 96:].T)
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    random_model(config).save_pretrained(tmp_path)
    tied = Checkpoint(tmp_path)
    untied = unfused_checkpoint(tied, {"lm_head"}, lm_head=True)
    embedding = tied.tensors["model.embed_tokens.weight"].read()
    assert torch.equal(untied.tensors["lm_head.weight"].read(), embedding)
    assert unfused_checkpoint(tied, {"model.layers.0.mlp.up_proj"}, lm_head=False) is tied


def test_released_memory_is_read_again(llama: Path) -> None:
    streamed = open_streamed_model(llama)
    block = streamed.blocks[0]
    streamed.load(block.module, block.name)
    name = f"{block.name}.mlp.down_proj"
    weight = block.linears[name].weight
    before = weight.clone()
    streamed.release_pages([name])
    assert torch.equal(weight, before)


def in_memory(file: Path) -> np.ndarray:
    """Returns for each page of a file whether the system has it in memory."""
    with file.open("rb") as handle:
        view = np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    resident = np.zeros(-(-view.size // mmap.PAGESIZE), np.uint8)
    where, size = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.size)
    assert ctypes.CDLL(None).mincore(where, size, ctypes.c_void_p(resident.ctypes.data)) == 0
    return resident & 1


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
    streamed.prefetch(2)  # no such block: no-op


def test_weights_that_blocks_share_are_skipped(tmp_path: Path) -> None:
    tiny_model("ZambaForCausalLM").save_pretrained(tmp_path)
    streamed = open_streamed_model(tmp_path)
    skipped = [name for block in streamed.blocks for name in block.skipped_linears]
    shared = [name for name in skipped if ".shared_transf." in name]
    assert {name.split(".")[2] for name in shared} == {"1", "3"}
    assert not any("shared_transf" in name for block in streamed.blocks for name in block.linears)
    reasons = {
        block.skipped_linears[name]
        for block in streamed.blocks
        for name in {*shared} & {*block.skipped_linears}
    }
    assert reasons == {"it shares its weight with a layer of another block"}


def test_a_head_that_is_an_embedding_is_loaded(tmp_path: Path) -> None:
    tiny_model("FSMTForConditionalGeneration").save_pretrained(tmp_path)
    streamed = open_streamed_model(tmp_path)
    streamed.load_outside_blocks()
    assert not streamed.model.get_output_embeddings().weight.is_meta
