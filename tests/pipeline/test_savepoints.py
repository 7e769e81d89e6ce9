"""What a stopped run goes on from, and when it is written; on a device, see `test_device.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import roundwise as rw
from roundwise.models.skeleton import Skeleton
from roundwise.pipeline import savepoints
from roundwise.pipeline.savepoints import Pace
from tests.helpers import LLAMA, Stop, windows


def test_writing_takes_a_twentieth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 100.0, 0
    monkeypatch.setattr(savepoints.time, "monotonic", lambda: now)
    pace = Pace()
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
    monkeypatch.setattr(Skeleton, "read_ahead", lambda _, index: ahead.append(index))
    found = []
    config = rw.QuantizeConfig(method="rtn", group_size=32)
    rw.quantize(
        llama, tmp_path, config, progress=lambda step: found.append((step.block, ahead[-1]))
    )
    assert found
    assert all(later == block + 1 for block, later in found)


def test_finished_blocks_are_recorded_together(llama: Path, tmp_path: Path) -> None:
    """A line that was being written when the process died takes none of the others with it."""

    def stop(step: rw.Progress) -> None:
        if step.layer is None:
            raise Stop

    config = rw.QuantizeConfig(recipe="textbook", group_size=32)
    with pytest.raises(Stop):
        rw.quantize(llama, tmp_path, config, windows(), progress=stop)
    lines = (tmp_path / ".roundwise" / "journal.jsonl").read_text().splitlines()
    assert [block["block"] for block in json.loads(lines[1])] == [0]
