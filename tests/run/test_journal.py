"""The journal: a line proves that blocks and shards are on disk; saved activations are exact."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from roundwise.checkpoint.manifest import (
    BlockRecord,
    Fingerprint,
    GivenNames,
    SavedActivations,
    Shard,
    ShardRecord,
)
from roundwise.errors import OutputError
from roundwise.run.journal import (
    Journal,
    JournalContents,
    block_file,
    load_outputs,
    save_outputs,
)
from tests.helpers import raw


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "out")
    yield journal
    journal.close()


def record(block: int, activations: SavedActivations | None = None) -> BlockRecord:
    return BlockRecord(
        block=block, sha256="0", nbytes=1, activations=activations,
        layers=[], experts={}, seconds={"solve": 1.5}, name="layers.0",
        depth_error=None,
    )  # fmt: skip


def shard(number: int, blocks: list[int]) -> ShardRecord:
    return ShardRecord(
        shard=Shard(name=f"model-0000{number}-of-00002.safetensors", blocks=blocks, others=[]),
        sha256="0",
    )


RUN = Fingerprint(threads=4)
GIVEN = GivenNames(model="model", calibration=None)


def test_lines_are_read_in_order(journal: Journal) -> None:
    assert journal.read() == JournalContents()
    journal.start(RUN, GIVEN)
    assert journal.read() == JournalContents(RUN)
    for blocks in ([record(0)], [record(1), record(2)]):
        journal.blocks_done(blocks, keep=set())
    blocks = (record(0), record(1), record(2))
    assert journal.read() == JournalContents(RUN, blocks)
    shards = (shard(0, blocks=[0, 1]), shard(1, blocks=[2]))
    for each in shards:
        journal.shard_done(each)
    assert journal.read() == JournalContents(RUN, blocks, shards)


def test_the_files_of_blocks_go_after_the_line_of_their_shard(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.start(RUN, GIVEN)
    files = [journal.folder / block_file(block) for block in range(3)]
    for file in files:
        file.touch()
    unlink, lines = Path.unlink, []

    def count_lines(path: Path, **options: Any) -> None:
        lines.append(len(journal.path.read_text().splitlines()))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", count_lines)
    journal.shard_done(shard(0, blocks=[0, 1]))
    assert lines == [2, 2]
    assert [file.exists() for file in files] == [False, False, True]
    journal.remove_joined(shard(0, blocks=[0, 1]))  # a killed run may have removed them or not


@pytest.mark.parametrize("version", [None, 1, 3, "2"])
def test_a_journal_of_another_version_is_refused(version: Any, journal: Journal) -> None:
    first = {"fingerprint": RUN.as_json()} | ({} if version is None else {"version": version})
    old = {"block": 0, "shard": "model-00001-of-00003.safetensors", "sha256": "0"}
    journal.path.write_text(f"{json.dumps(first)}\n{json.dumps([old])}\n")
    message = r"unfinished run of another version of roundwise: start again with --restart"
    with pytest.raises(OutputError, match=message):
        journal.read()


@pytest.mark.parametrize(
    "lines",
    [
        [{"shard": {"name": "../x", "blocks": [], "others": []}, "sha256": "0"}],
        [{"shard": {"name": "x", "blocks": ["0"], "others": []}, "sha256": "0"}],
        [{"shard": {"name": "x", "blocks": [0]}, "sha256": "0"}],
        [{}],
        [{"shard": {"name": "x", "blocks": [], "others": []}, "sha256": "0"}, []],  # then blocks
        [7],
    ],
)
def test_damaged_lines_are_refused(lines: list[Any], journal: Journal) -> None:
    journal.start(RUN, GIVEN)
    with journal.path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    with pytest.raises(OutputError, match=r"journal.jsonl is damaged: use --restart"):
        journal.read()


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
    assert journal.read().blocks == (record(0),)
    journal.trim()
    journal.blocks_done([record(1)], keep=set())
    assert journal.read().blocks == (record(0), record(1))


def test_an_incomplete_first_line_is_an_empty_journal(journal: Journal) -> None:
    journal.path.write_text('{"fingerpr')
    assert journal.read() == JournalContents()


def test_shards_that_no_line_proves_are_removed(journal: Journal) -> None:
    journal.start(RUN, GIVEN)
    out = journal.folder.parent
    journal.shard_done(shard(0, blocks=[]))
    for name in (shard(0, []).shard.name, shard(1, []).shard.name, "notes.safetensors"):
        (out / name).touch()
    journal.trim()
    names = {".roundwise", shard(0, []).shard.name, "notes.safetensors"}
    assert {path.name for path in out.iterdir()} == names


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


def test_a_run_cannot_resume_behind_a_block_that_returns_something_else(journal: Journal) -> None:
    outputs = {"probe": {"hidden": torch.ones(1)}}
    assert save_outputs(journal.folder.parent, 2, 0, outputs) is None


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
