"""Embedding tables that stay in their files: memory does not grow, and modified weights are kept."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import roundwise as rw
from roundwise.inference.cpu import mmap_embedding
from roundwise.inference.cpu.mmap_embedding import MappedEmbedding
from roundwise.system.madvise import whole_pages
from tests.helpers import LLAMA, random_model, windows

ROWS = 4096
PAGEMAP = Path("/proc/self/pagemap")
needs_pagemap = pytest.mark.skipif(not PAGEMAP.exists(), reason="needs Linux's pagemap")


def in_memory(tensor: torch.Tensor) -> int:
    """Pages of a tensor that this process holds."""
    first, length = whole_pages(tensor.data_ptr(), tensor.nbytes)
    with PAGEMAP.open("rb", buffering=0) as file:
        file.seek(first // mmap.PAGESIZE * 8)
        entries = file.read(length // mmap.PAGESIZE * 8)
    return sum(entry >> 7 for entry in entries[7::8])  # the last byte's last bit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model with a table of a megabyte."""
    made = tmp_path_factory.mktemp("mapped")
    random_model(transformers.LlamaConfig(**{**LLAMA, "vocab_size": ROWS})).save_pretrained(
        made / "model"
    )
    config = rw.QuantizeConfig(recipe="textbook", group_size=32)
    rw.quantize(made / "model", made / "out", config, windows(), samples=4, seq_len=32)
    return made / "out"


@pytest.fixture
def load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Loads the model, with tables of every size mapped, and their pages dropped after 100 tokens."""
    monkeypatch.setattr(mmap_embedding, "LARGE", 1)
    monkeypatch.setattr(mmap_embedding, "LOOKUPS", 100)
    return lambda: rw.load(folder)[0]


@needs_pagemap
def test_memory_does_not_grow(load: Callable[[], Any], folder: Path) -> None:
    table = load().get_input_embeddings()
    assert type(table) is MappedEmbedding
    assert table.weight.nbytes == ROWS * 256
    plain = nn.functional.embedding(torch.arange(ROWS), table.weight).clone()
    assert in_memory(table.weight) > 200  # of 256, all
    held = []
    for ids in torch.arange(ROWS).split(10):
        assert torch.equal(table(ids), plain[ids])
        held.append(in_memory(table.weight))
    assert min(held) == 0
    assert max(held[9:400:10]) == 0  # every hundred tokens
    assert max(held[10:]) > 0
    assert torch.equal(table(torch.arange(ROWS)), plain)


@needs_pagemap
@pytest.mark.parametrize("way", ["data", "in place", "optimizer"])
def test_modified_weights_are_kept(load: Callable[[], Any], way: str) -> None:
    model = load()
    table = model.get_input_embeddings()
    table(torch.arange(ROWS))
    assert table.mapped_address
    if way == "data":
        table.weight.data[17] = 3.0
    elif way == "in place":
        with torch.no_grad():
            table.weight[17].fill_(3.0)
    else:
        table.weight.requires_grad_(True)
        step = torch.optim.SGD([table.weight], lr=1.0)
        (-3.0 * table(torch.tensor([17]))).sum().backward()
        table.weight.grad[17] += table.weight.data[17]
        step.step()
    for _ in range(3):
        table(torch.arange(ROWS))
    torch.testing.assert_close(table.weight.data[17], torch.full((64,), 3.0))
    assert not table.mapped_address  # its pages are not dropped any more


def test_a_replaced_weight_is_not_dropped(load: Callable[[], Any]) -> None:
    model = load()
    table = model.get_input_embeddings()
    table.weight = nn.Parameter(torch.ones_like(table.weight))
    for _ in range(3):
        assert torch.equal(table(torch.arange(ROWS)), torch.ones(ROWS, 64))
    assert not table.mapped_address


def test_only_large_tables_that_nothing_else_uses(
    load: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "model.embed_tokens.weight" in load().state_dict()
    monkeypatch.setattr(mmap_embedding, "LARGE", 2 << 20)
    assert type(load().get_input_embeddings()) is nn.Embedding
    monkeypatch.setattr(mmap_embedding, "LARGE", 1)
    config = transformers.LlamaConfig(**{**LLAMA, "tie_word_embeddings": True})
    random_model(config).save_pretrained(tmp_path / "tied")
    settings = rw.QuantizeConfig(method="rtn", group_size=32)
    rw.quantize(tmp_path / "tied", tmp_path / "out", settings)
    assert type(rw.load(tmp_path / "out")[0].get_input_embeddings()) is nn.Embedding
