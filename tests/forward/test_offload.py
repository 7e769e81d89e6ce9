"""Paused batches offloaded to a file: the same results, and what modules hold is not touched."""

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
from roundwise.checkpoint.reader import SINGLE_FILE
from roundwise.errors import StorageError
from roundwise.forward import offload
from roundwise.forward.batch import ENTER, PausedBatch, pause
from roundwise.forward.offload import DiskOffload
from tests.helpers import ARCHITECTURES, Stop, contents, random_model, stop_after, windows
from tests.mixtures import MIXTURES

#: A budget that is too small for any plan.
TOO_SMALL = 1
CONFIGS = {name: each.config for name, each in {**ARCHITECTURES, **MIXTURES}.items()}


@pytest.fixture
def transfers(monkeypatch):
    """Numbers of storages that were written and read; storages of any size are offloaded."""
    count = {"written": 0, "read": 0}
    transfer = DiskOffload._transfer

    def counted(self, storage, size, offset, *, to_file):
        count["written" if to_file else "read"] += 1
        transfer(self, storage, size, offset, to_file=to_file)

    monkeypatch.setattr(DiskOffload, "_transfer", counted)
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    return count


def quantize(model, out, **options):
    config = rw.QuantizeConfig(group_size=32, exchange=2, grid_candidates=2)
    return rw.quantize(model, out, config, windows(5), batch_size=2, **options)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_run_that_offloads_to_a_file_writes_the_same_bytes(name, tmp_path, transfers):
    random_model(CONFIGS[name]()).save_pretrained(tmp_path / "model")
    plain = quantize(tmp_path / "model", tmp_path / "plain", mode="true_sequential")
    assert transfers == {"written": 0, "read": 0}
    offloaded = quantize(
        tmp_path / "model", tmp_path / "offloaded", mode="true_sequential", max_memory=TOO_SMALL
    )
    assert transfers["written"] > 0 and transfers["read"] > 0
    first, second = (contents(result.output) for result in (plain, offloaded))
    assert {k: v for k, v in first.items() if k.endswith(".safetensors")} == {
        k: v for k, v in second.items() if k.endswith(".safetensors")
    }


def test_an_encoder_decoder_model(tmp_path, transfers):
    sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4}
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, num_layers=2, decoder_start_token_id=0)
    ).save_pretrained(tmp_path / "model")
    options = {"mode": "true_sequential"}
    plain = quantize(tmp_path / "model", tmp_path / "plain", **options)
    offloaded = quantize(
        tmp_path / "model", tmp_path / "offloaded", max_memory=TOO_SMALL, **options
    )
    assert transfers["written"] > 0
    assert contents(plain.output)[SINGLE_FILE] == contents(offloaded.output)[SINGLE_FILE]


def test_a_stopped_run_that_offloads_resumes(tmp_path, transfers):
    random_model(CONFIGS["llama"]()).save_pretrained(tmp_path / "model")
    options = {"mode": "true_sequential", "max_memory": TOO_SMALL}
    whole = quantize(tmp_path / "model", tmp_path / "whole", **options)
    with pytest.raises(Stop):
        quantize(tmp_path / "model", tmp_path / "out", progress=stop_after(1), **options)
    resumed = quantize(tmp_path / "model", tmp_path / "out", **options)
    assert contents(whole.output)[SINGLE_FILE] == contents(resumed.output)[SINGLE_FILE]


class Pausing(nn.Module):
    """Pauses in its forward, with tensors in its frame; some of them belong to the module."""

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
def paused(tmp_path, monkeypatch):
    """A model that is paused in its forward with input `x`, and an offload for it."""
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    model, result = Pausing(), []
    x = torch.randn(32, 64)
    batch = PausedBatch(Batch(torch.zeros(1, 1, dtype=torch.long), None), 0)
    batch.task = greenlet(lambda: result.append(model(x)))
    with torch.no_grad():
        batch.stopped_at = batch.task.switch()
    disk = DiskOffload(tmp_path, model)
    disk.mark_shared()
    yield SimpleNamespace(model=model, batch=batch, x=x, result=result, disk=disk)
    disk.close()


def test_tensors_in_frames_are_emptied_and_filled_with_all_their_views(paused):
    model, batch, x, disk = paused.model, paused.batch, paused.x, paused.disk
    expected = (x * 2)[:, 3:].sum() + torch.arange(4096).sum() + model.table.sum()
    expected += model.weight.detach().sum()
    disk.offload(batch)
    assert x.untyped_storage().nbytes() == 0  # the same storage as in the frame
    assert (
        model.table.untyped_storage().nbytes() == 64 * 64 * 4
    )  # the module's: all batches need it
    assert model.weight.untyped_storage().nbytes() == 64 * 64 * 4
    assert disk.end == 2 * 32 * 64 * 4  # x and x * 2, which the view shares
    with disk.onloaded(batch):
        assert x.untyped_storage().nbytes() == 32 * 64 * 4
    assert x.untyped_storage().nbytes() == 0
    disk.onload(batch)
    with torch.no_grad():
        batch.task.switch()
    assert torch.allclose(paused.result[0], expected)
    assert disk.end == 2 * 32 * 64 * 4  # places in the file are reused


def test_a_full_disk_is_reported(paused, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="disk is full"):
        paused.disk.offload(paused.batch)
