"""A file is complete or does not exist; its bytes depend only on its tensors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from roundwise.checkpoint import writer
from roundwise.checkpoint.reader import DTYPES, Checkpoint, read_header
from roundwise.checkpoint.untrusted import file_digest
from roundwise.checkpoint.writer import (
    LazyTensor,
    atomic_write,
    copied_tensor,
    copy_file,
    partial_path,
    write_json,
    write_safetensors,
)
from roundwise.errors import StorageError
from tests.helpers import Stop, raw


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(3),
        **{name: (torch.arange(7) % 2).to(dtype) for name, dtype in DTYPES.items()},
    }


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    digest = write_safetensors(path, some_tensors())
    assert digest == file_digest(path)
    read = load_file(path)
    for name, tensor in some_tensors().items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(read[name]) == raw(tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_stored_tensors_are_copied_byte_for_byte(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", some_tensors())
    write_safetensors(tmp_path / "b.safetensors", read_header(tmp_path / "a.safetensors"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_data_begin_at_a_multiple_of_8(tmp_path: Path) -> None:
    for length in range(1, 9):
        path = tmp_path / "x.safetensors"
        write_safetensors(path, {"n" * length: torch.ones(2)})
        assert next(iter(read_header(path).values())).start % 8 == 0


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt(), OSError(errno.EIO, "bad disk")])
def test_an_error_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    kind = StorageError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind), atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_whose_rename_was_not_flushed_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.EIO, "bad disk")

    monkeypatch.setattr(writer, "sync_folder", fail)
    with pytest.raises(StorageError, match=r"cannot write .*: bad disk"):
        write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []


def test_the_first_error_is_reported_even_if_removing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def keep(_: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(Path, "unlink", keep)
    with pytest.raises(StorageError, match="the disk is full"):
        write_json(tmp_path / "x.json", {})
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "the disk is full while writing .*x.json: free some space"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EROFS, "cannot write .*x.json: Read-only file system"),
    ],
)
def test_a_failed_write_is_one_sentence(
    number: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writer.os, "fsync", fail)
    with pytest.raises(StorageError, match=says):
        write_json(tmp_path / "x.json", {})
    assert not list(tmp_path.iterdir())


def test_content_is_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append("sync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync file")  # noqa: PTH112
        sync(descriptor)

    def renamed(*paths: Path) -> None:
        calls.append("rename")
        rename(*paths)

    monkeypatch.setattr(writer.os, "fsync", synced)
    monkeypatch.setattr(writer.os, "replace", renamed)
    write_json(tmp_path / "x.json", {"a": 1})
    assert calls == ["sync file", "rename", "sync folder"]


def test_copies_keep_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 1000)
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("length", [1, 247, 248, 255])
def test_temporary_names_fit_and_differ(length: int, tmp_path: Path) -> None:
    paths = [tmp_path / (letter * length) for letter in "ab"]
    partial = [partial_path(path) for path in paths]
    assert len({*paths, *partial}) == 4
    for path in partial:
        assert path.parent == tmp_path and path.name.endswith(".partial")
        assert len(path.name.encode()) <= 255


def test_a_lazy_tensor_is_made_when_it_is_read(llama: Path) -> None:
    made = []
    lazy = LazyTensor("a", 8, lambda: made.append(1) or torch.arange(2))
    assert not made
    assert lazy.read().tolist() == [0, 1]
    name, info = next(iter(Checkpoint(llama).tensors.items()))
    copied = copied_tensor(name, info)
    assert copied.nbytes == info.nbytes
    assert torch.equal(copied.read(), info.read())
