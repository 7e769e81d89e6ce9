"""What the system is told about pages of this process's memory, where it listens."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import torch

#: madvise. Pages of a mapped file go until they are read again, and what was changed is lost (DONTNEED);
#: the same, but what was changed stays, and the system forgets what it has read (PAGEOUT, Linux 5.4);
#: memory that is filled at once comes in large pages (HUGE).
DONTNEED, PAGEOUT, HUGE = 4, 21, 14
#: Bits of an entry of /proc/self/pagemap: the page is a file's, in the swap file; the next: in memory.
OF_FILE, SWAPPED = 61, 62


def whole_pages(start: int, nbytes: int) -> tuple[int, int]:
    """Address and bytes of the whole pages of a range; 0 bytes if there is none."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    return first, max(0, (start + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first)


def madvise(start: int, nbytes: int, advice: int) -> None:
    """Tells the system (madvise) of the whole pages of a range of addresses."""
    first, length = whole_pages(start, nbytes)
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None and length:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice)


def is_unmodified(start: int, nbytes: int) -> bool:
    """Whether pages of a range were read from a file and none was changed; False if nobody can tell.

    Of whole pages, one at least in memory: where a system tells nothing, it looks as if none were.
    A private map's page is a file's until it is written to, and the process's own from then on.
    """
    first, size = (value // mmap.PAGESIZE * 8 for value in whole_pages(start, nbytes))
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            file.seek(first)
            data = bytearray(file.read(size))
    except OSError:
        return False
    if not data or len(data) != size:
        return False
    entries = torch.frombuffer(data, dtype=torch.int64)
    held = (entries >> SWAPPED) & 3 != 0
    return bool(held.any()) and bool(((entries >> OF_FILE) & 1 == 1)[held].all())
