"""Pages of mapped files: dropped from memory without loss, and recognized once they were changed."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from roundwise.system.madvise import DONTNEED, PAGEOUT, is_unmodified, madvise, whole_pages

PAGE = mmap.PAGESIZE
needs_pagemap = pytest.mark.skipif(
    not Path("/proc/self/pagemap").exists(), reason="needs Linux's pagemap"
)


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[torch.Tensor]:
    """A tensor of 16 pages, privately mapped from a file whose bytes are all 1."""
    (tmp_path / "file").write_bytes(b"\1" * (16 * PAGE))
    with (tmp_path / "file").open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    yield torch.frombuffer(view, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("start", "nbytes", "expected"),
    [
        (0, 2 * PAGE, (0, 2 * PAGE)),
        (1, 2 * PAGE, (PAGE, PAGE)),
        (PAGE - 1, PAGE + 1, (PAGE, PAGE)),
        (1, PAGE, (PAGE, 0)),
        (PAGE, 0, (PAGE, 0)),
    ],
)
def test_whole_pages(start: int, nbytes: int, expected: tuple[int, int]) -> None:
    assert whole_pages(start, nbytes) == expected


def test_paged_out_memory_keeps_its_changes(mapped: torch.Tensor) -> None:
    mapped[5] = 7
    madvise(mapped.data_ptr(), mapped.nbytes, PAGEOUT)
    assert int(mapped[5]) == 7
    assert int(mapped.sum()) == 16 * PAGE + 6


def test_dropped_memory_is_read_from_the_file_again(mapped: torch.Tensor) -> None:
    mapped[5] = 7
    madvise(mapped.data_ptr(), mapped.nbytes, DONTNEED)
    assert int(mapped.sum()) == 16 * PAGE


@needs_pagemap
def test_a_changed_page_is_recognized(mapped: torch.Tensor) -> None:
    address, nbytes = mapped.data_ptr(), mapped.nbytes
    mapped.sum()
    assert is_unmodified(address, nbytes)
    mapped[3 * PAGE] = 7
    assert not is_unmodified(address, nbytes)
    assert is_unmodified(address + 4 * PAGE, nbytes - 4 * PAGE)


@needs_pagemap
def test_memory_that_is_not_a_files_is_not_unmodified() -> None:
    x = torch.ones(16 * PAGE, dtype=torch.uint8)
    assert not is_unmodified(x.data_ptr(), x.nbytes)
    assert not is_unmodified(x.data_ptr(), 1)  # not one whole page
