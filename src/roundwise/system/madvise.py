"""Advice to the kernel about pages of this process's memory (madvise); no-ops on other systems."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import torch

#: madvise. DONTNEED drops pages of a mapped file until they are read again, changes included; PAGEOUT
#: (Linux 5.4) keeps changes and also drops the file's pages from the system's cache; HUGE backs memory
#: that is filled at once with large pages.
DONTNEED, PAGEOUT, HUGE = 4, 21, 14
#: Bits of an entry of /proc/self/pagemap: the page belongs to a file; it is swapped out. The bit after
#: SWAPPED: it is in memory.
OF_FILE, SWAPPED = 61, 62


def whole_pages(start: int, nbytes: int) -> tuple[int, int]:
    """Returns address and length in bytes of the whole pages inside a range; length 0: there is none.

    Args:
        start: first address of the range.
        nbytes: length of the range in bytes.
    """
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    return first, max(0, (start + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first)


def madvise(start: int, nbytes: int, advice: int) -> None:
    """Calls madvise for the whole pages inside a range of addresses.

    Args:
        start: first address of the range.
        nbytes: length of the range in bytes.
        advice: DONTNEED, PAGEOUT or HUGE.
    """
    first, length = whole_pages(start, nbytes)
    libc_madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if libc_madvise is not None and length:
        libc_madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice)


def is_unmodified(start: int, nbytes: int) -> bool:
    """Returns True if the pages in a range were read from a file and none was changed.

    Looks at whole pages only, and at least one must be in memory: a system that reports nothing looks
    as if none were. False also where the system does not tell. A page of a private map belongs to the
    file until it is written to, and to the process from then on.

    Args:
        start: first address of the range.
        nbytes: length of the range in bytes.
    """
    offset, size = (value // mmap.PAGESIZE * 8 for value in whole_pages(start, nbytes))
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            file.seek(offset)
            data = bytearray(file.read(size))
    except OSError:
        return False
    if not data or len(data) != size:
        return False
    entries = torch.frombuffer(data, dtype=torch.int64)
    held = (entries >> SWAPPED) & 3 != 0
    return bool(held.any()) and bool(((entries >> OF_FILE) & 1 == 1)[held].all())
