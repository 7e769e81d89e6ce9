"""Batches that wait in a file: the same bytes, less memory, and nothing taken that others use."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest
import torch
import transformers
from greenlet import greenlet
from torch import nn

import roundwise as rw
from roundwise.calibration.windows import Batch
from roundwise.errors import StorageError
from roundwise.forward import offload
from roundwise.forward.batch import ENTER, PausedBatch, pause
from roundwise.forward.offload import DiskOffload
from roundwise.system import madvise
from tests.helpers import ARCHITECTURES, Stop, contents, random_model, stop_after, windows
from tests.mixtures import MIXTURES

#: A budget for which nothing is small enough.
NOTHING = 1
CONFIGS = {name: each.config for name, each in {**ARCHITECTURES, **MIXTURES}.items()}


@pytest.fixture
def transfers(monkeypatch):
    """Storages that were written and read, however small they are."""
    seen = {"out": 0, "back": 0}
    transfer = DiskOffload._transfer

    def counted(self, storage, size, place, *, out):
        seen["out" if out else "back"] += 1
        transfer(self, storage, size, place, out=out)

    monkeypatch.setattr(DiskOffload, "_transfer", counted)
    monkeypatch.setattr(offload, "LEAST", 1)
    return seen


def quantize(model, out, **options):
    config = rw.QuantizeConfig(group_size=32, exchange=2, grid_candidates=2)
    return rw.quantize(model, out, config, windows(5), batch_size=2, **options)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_run_whose_batches_wait_in_a_file_writes_the_same_bytes(name, tmp_path, transfers):
    random_model(CONFIGS[name]()).save_pretrained(tmp_path / "model")
    plain = quantize(tmp_path / "model", tmp_path / "plain", mode="true_sequential")
    assert transfers == {"out": 0, "back": 0}
    waited = quantize(
        tmp_path / "model", tmp_path / "waited", mode="true_sequential", max_memory=NOTHING
    )
    assert transfers["out"] > 0 and transfers["back"] > 0
    first, second = (contents(result.output) for result in (plain, waited))
    assert {k: v for k, v in first.items() if k.endswith(".safetensors")} == {
        k: v for k, v in second.items() if k.endswith(".safetensors")
    }


def test_an_encoder_decoder_too(tmp_path, transfers):
    sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4}
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, num_layers=2, decoder_start_token_id=0)
    ).save_pretrained(tmp_path / "model")
    options = {"mode": "true_sequential"}
    plain = quantize(tmp_path / "model", tmp_path / "plain", **options)
    waited = quantize(tmp_path / "model", tmp_path / "waited", max_memory=NOTHING, **options)
    assert transfers["out"] > 0
    name = "model-00001-of-00005.safetensors"
    assert contents(plain.output)[name] == contents(waited.output)[name]


def test_it_goes_on_where_it_was(tmp_path, transfers):
    random_model(CONFIGS["llama"]()).save_pretrained(tmp_path / "model")
    options = {"mode": "true_sequential", "max_memory": NOTHING}
    whole = quantize(tmp_path / "model", tmp_path / "whole", **options)
    with pytest.raises(Stop):
        quantize(tmp_path / "model", tmp_path / "out", progress=stop_after(1), **options)
    resumed = quantize(tmp_path / "model", tmp_path / "out", **options)
    name = "model-00002-of-00003.safetensors"
    assert contents(whole.output)[name] == contents(resumed.output)[name]


def test_it_is_chosen_before_block_mode_where_only_that_fits(tmp_path):
    from roundwise.model.streamed import open_streamed_model
    from roundwise.plan.memory import plan_memory

    random_model(CONFIGS["llama"]()).save_pretrained(tmp_path / "model")
    streamed, config = open_streamed_model(tmp_path / "model"), rw.QuantizeConfig(recipe="textbook")
    found, budget = [], None
    for _ in range(5):
        memory = plan_memory(streamed, config, tokens=1 << 20, batch=64, budget=budget)
        found.append((memory.mode, memory.offloaded, memory.keeps_freed, memory.fits))
        budget = memory.peak_bytes - 1
    # The last fits nowhere: what needs least.
    assert found == [
        ("true_sequential", False, True, True), ("true_sequential", False, False, True),
        ("true_sequential", True, True, True), ("true_sequential", True, False, True),
        ("true_sequential", True, False, False),
    ]  # fmt: skip


class Waiting(nn.Module):
    """Holds a table; waits with tensors in its frame."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(64, 64)
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = {"whole": (x * 2,), "table": self.table, "weight": self.weight}
        view, chosen = held["whole"][0][:, 3:].T, torch.arange(4096)
        pause(ENTER)
        return view.sum() + chosen.sum() + held["table"].sum() + held["weight"].sum()


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "LEAST", 1)
    model, result = Waiting(), []
    x = torch.randn(32, 64)
    player = PausedBatch(Batch(torch.zeros(1, 1, dtype=torch.long), None), 0)
    player.task = greenlet(lambda: result.append(model(x)))
    with torch.no_grad():
        player.stopped_at = player.task.switch()
    place = DiskOffload(tmp_path, model)
    place.mark_shared()
    yield SimpleNamespace(model=model, player=player, x=x, result=result, place=place)
    place.close()


def test_what_waits_is_gone_and_comes_back_with_all_its_views(waiting):
    w = waiting
    expected = (w.x * 2)[:, 3:].sum() + torch.arange(4096).sum() + w.model.table.sum()
    expected += w.model.weight.detach().sum()
    w.place.offload(w.player)
    assert w.x.untyped_storage().nbytes() == 0  # the caller's name for the same storage
    assert w.model.table.untyped_storage().nbytes() == 64 * 64 * 4  # a module's: everybody's
    assert w.model.weight.untyped_storage().nbytes() == 64 * 64 * 4
    assert w.place.end == 2 * 32 * 64 * 4  # x, and twice of it, which the view shares
    with w.place.onloaded(w.player):
        assert w.x.untyped_storage().nbytes() == 32 * 64 * 4
    assert w.x.untyped_storage().nbytes() == 0
    w.place.onload(w.player)
    with torch.no_grad():
        w.player.task.switch()
    assert torch.allclose(w.result[0], expected)
    assert w.place.end == 2 * 32 * 64 * 4  # room in the file is used again


def test_a_full_disk_is_said_so(waiting, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="disk is full"):
        waiting.place.offload(waiting.player)


def test_pages_of_a_mapped_file_leave_memory_and_keep_what_was_written_to_them(tmp_path):
    import mmap

    (tmp_path / "file").write_bytes(bytes(1 << 22))
    with (tmp_path / "file").open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensor = torch.frombuffer(view, dtype=torch.uint8)
    assert int(tensor.sum()) == 0
    tensor[5] = 7
    madvise.madvise(tensor.data_ptr(), tensor.nbytes, madvise.PAGEOUT)
    assert int(tensor.sum()) == 7
