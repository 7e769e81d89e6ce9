"""The journal: a line proves that shards and activations are on disk; saved activations are exact."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from roundwise.checkpoint.manifest import BlockRecord, Fingerprint, GivenNames, SavedActivations
from roundwise.errors import OutputError, RunError
from roundwise.run.journal import Journal, load_outputs, save_outputs
from tests.helpers import raw


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "out")
    yield journal
    journal.close()


def record(block: int, activations: SavedActivations | None = None) -> BlockRecord:
    return BlockRecord(
        block=block, shard=f"{block}.safetensors", sha256="0", activations=activations,
        layers=[], experts={}, seconds={"solve": 1.5}, name="layers.0",
        depth_error=None, saturation=None,
    )  # fmt: skip


RUN = Fingerprint(threads=4)
GIVEN = GivenNames(model="model", calibration=None)


def test_lines_are_read_in_order(journal: Journal) -> None:
    assert journal.read() == (None, [])
    journal.start(RUN, GIVEN)
    assert journal.read() == (RUN, [])
    for block in range(3):
        journal.blocks_done([record(block)], keep=set())
    assert journal.read() == (RUN, [record(0), record(1), record(2)])


def test_a_line_is_synced_to_disk(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.start(RUN, GIVEN)
    synced: list[str] = []
    sync = os.fsync

    def sync_and_note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
        sync(descriptor)

    monkeypatch.setattr("roundwise.run.journal.os.fsync", sync_and_note)
    journal.blocks_done([record(0)], keep=set())
    assert str(journal.path) in synced


def test_an_incomplete_line_is_ignored_and_dropped(journal: Journal) -> None:
    journal.start(RUN, GIVEN)
    journal.blocks_done([record(0)], keep=set())
    with journal.path.open("a") as file:
        file.write('{"block": 1')
    assert journal.read()[1] == [record(0)]
    journal.trim()
    journal.blocks_done([record(1)], keep=set())
    assert journal.read()[1] == [record(0), record(1)]


def test_an_incomplete_first_line_is_an_empty_journal(journal: Journal) -> None:
    journal.path.write_text('{"fingerpr')
    assert journal.read() == (None, [])


def test_incomplete_files_are_removed(journal: Journal) -> None:
    journal.start(RUN, GIVEN)
    out = journal.folder.parent
    for path in (out / "model-00001.safetensors.partial", journal.folder / "x.partial"):
        path.touch()
    journal.trim()
    assert not list(out.rglob("*.partial"))


@pytest.mark.parametrize(
    "outputs",
    [
        [torch.randn(1, 8, 4), torch.randn(2, 5, 4)],
        [(torch.randn(1, 8, 4),), (torch.randn(2, 5, 4),)],
        [(torch.randn(2, 3), None, torch.randn(4)), (torch.randn(2, 2), None, torch.randn(1))],
        [torch.randn(3, 4).bfloat16().T, torch.randn(3, 4).bfloat16()],
    ],
    ids=["tensors", "tuples", "with none", "transposed"],
)
def test_outputs_are_loaded_bit_for_bit(journal: Journal, outputs: list[Any]) -> None:
    out = journal.folder.parent
    # Each of two ranks writes the outputs of its batches; either reads those of both.
    of_rank = [{f"quantized-{i}": outputs[i]} for i in range(2)]
    saved = [save_outputs(out, 3, rank, of_rank[rank]) for rank in range(2)]
    files = {**saved[0].files, **saved[1].files}
    loaded = load_outputs(out, SavedActivations(files=files, places=saved[0].places))
    assert loaded.keys() == {"quantized-0", "quantized-1"}
    for before, after in zip(outputs, loaded.values(), strict=True):
        assert isinstance(after, tuple) == isinstance(before, tuple)
        pairs = (
            [(before, after)]
            if isinstance(before, torch.Tensor)
            else zip(before, after, strict=True)
        )
        for old, new in pairs:
            assert (old is None) == (new is None)
            assert old is None or (raw(old) == raw(new) and old.shape == new.shape)


def test_a_block_that_returns_something_else_is_refused(journal: Journal) -> None:
    with pytest.raises(RunError, match="block 2 returns a dict, not a tensor"):
        save_outputs(journal.folder.parent, 2, 0, {"probe": {"hidden": torch.ones(1)}})


def test_only_activations_that_are_needed_are_kept(journal: Journal) -> None:
    journal.start(RUN, GIVEN)
    for block in range(3):
        saved = save_outputs(journal.folder.parent, block, 0, {"probe": torch.ones(2)})
        keep = {"activations-00000-0.safetensors", *saved.files}
        journal.blocks_done([record(block, saved)], keep=keep)
        assert {path.name for path in journal.folder.glob("activations-*")} == keep


def test_one_process_at_a_time(journal: Journal) -> None:
    out = journal.folder.parent
    with pytest.raises(OutputError, match="another roundwise process is working in"):
        Journal(out)
    journal.close()
    Journal(out).close()


def test_a_file_system_without_locks_is_not_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("roundwise.run.journal.fcntl.flock", refuse)
    with pytest.raises(OutputError, match=r"cannot lock .*lock: No locks available"):
        Journal(tmp_path / "out")


def test_finishing_removes_the_work_folder_only(journal: Journal) -> None:
    (journal.folder.parent / "config.json").touch()
    journal.finish()
    assert [path.name for path in journal.folder.parent.iterdir()] == ["config.json"]
