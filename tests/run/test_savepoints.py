"""What a stopped run goes on from, and when it is written; on a device, see `test_device.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import roundwise as rw
from roundwise.checkpoint.manifest import Fingerprint, SavedActivations
from roundwise.model.blocks import Block
from roundwise.model.streamed import StreamedModel
from roundwise.run import resume
from roundwise.run.journal import Journal
from roundwise.run.resume import Checkpointer, WritePace
from roundwise.system.distributed import Ranks
from tests.helpers import LLAMA, Stop, windows
from tests.run.test_journal import record


def test_writing_takes_a_twentieth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 100.0, 0
    monkeypatch.setattr(resume.time, "monotonic", lambda: now)
    pace = WritePace()
    assert pace.due()
    for _ in range(1000):
        now += 1.0  # a block
        if pace.due():
            with pace.writing():
                now += 2.5
            written += 1
    assert written == pytest.approx(1000 / (19 * 2.5), rel=0.05)
    assert 2.5 * written / (now - 100) <= 0.05


def test_what_the_last_block_returns_is_not_written(llama: Path, tmp_path: Path) -> None:
    blocks, found = LLAMA["num_hidden_layers"], []

    def stop(step: rw.Progress) -> None:
        if step.layer is None:
            found.append(sorted(p.name for p in (tmp_path / ".roundwise").glob("activations-*")))

    config = rw.QuantizeConfig(recipe="textbook", group_size=32)
    rw.quantize(llama, tmp_path, config, windows(), progress=stop)
    names = [[f"activations-{index:05d}-0.safetensors"] for index in range(blocks - 1)]
    assert found == [*names, names[-1]]  # a run that is stopped now has all its blocks


def test_the_next_block_is_read_while_one_is_played(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[int] = []
    monkeypatch.setattr(StreamedModel, "prefetch", lambda _, index: ahead.append(index))
    found = []
    config = rw.QuantizeConfig(method="rtn", group_size=32)
    rw.quantize(
        llama, tmp_path, config, progress=lambda step: found.append((step.block, ahead[-1]))
    )
    assert found
    assert all(later == block + 1 for block, later in found)


def test_a_finished_block_is_recorded(llama: Path, tmp_path: Path) -> None:
    def stop(step: rw.Progress) -> None:
        if step.layer is None:
            raise Stop

    config = rw.QuantizeConfig(recipe="textbook", group_size=32)
    with pytest.raises(Stop):
        rw.quantize(llama, tmp_path, config, windows(), progress=stop)
    lines = (tmp_path / ".roundwise" / "journal.jsonl").read_text().splitlines()
    assert [block["block"] for block in json.loads(lines[1])] == [0]


def test_finished_blocks_are_recorded_together(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.start(Fingerprint())
    blocks = [Block(f"layers.{index}", nn.Module(), {}) for index in range(4)]
    points = Checkpointer(tmp_path, blocks, [], journal, Ranks())
    saved = SavedActivations(files={"activations-00001-0.safetensors": "0"}, places=None)
    recorded = []
    for index, activations in enumerate([None, saved, None, None]):
        points.block_finished(record(index, activations), needs_activations=True)
        recorded.append(len(journal.path.read_text().splitlines()) - 1)
        read = [block.block for block in journal.read()[1]]
        assert read == ([], [0, 1], [0, 1], [0, 1, 2, 3])[index]
    assert recorded == [0, 1, 1, 2]  # the last needs nothing to go on from
    journal.close()
