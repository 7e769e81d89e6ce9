"""How much memory there is and is held, and how much the C library keeps."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from roundwise.config import Mode
from roundwise.errors import ConfigError

if TYPE_CHECKING:
    import torch

#: glibc's numbers for its options.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
#: From which size on a tensor is returned to the system as soon as it is freed: as a rule, and while
#: solving, whose temporaries (core.solver.ROW_WORKSPACE entries) are below it and what is kept above.
LARGE, LARGE_SOLVING = 1 << 20, 6 << 20
#: glibc's own settings of the others, and what switches both off.
TRIM, MAPPED, NEVER, NONE = 128 << 10, 1 << 16, (1 << 31) - 1, 0

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", start=1)}


def parse_size(text: str | int | None) -> int | None:
    """Bytes of a size such as 8GB, 512MiB or 900M; None stays None."""
    if text is None or isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?)B?\s*", text, flags=re.IGNORECASE)
    unit = match[2].upper().replace("I", "i") if match else "?"
    if match is None or unit not in UNITS:
        raise ConfigError(f"{text!r} is no size: write it as 8GB, 512MiB or 900MB")
    return int(float(match[1]) * UNITS[unit])


def format_size(nbytes: int) -> str:
    """Bytes for people: 4.6 MB."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def parse_mode(text: str | None) -> Mode | None:
    """A mode by its name; None stays None.

    Raises:
        ConfigError: another name.
    """
    if text not in (None, "true_sequential", "block"):
        raise ConfigError(f"mode={text!r} is not supported: use true_sequential or block")
    return text  # type: ignore[return-value]  # just checked


def available_memory(device: torch.device | None = None) -> int:
    """Bytes of memory that are free, or can be made free, where a device computes; None: the CPU."""
    if device is not None and device.type != "cpu":
        from roundwise.system.device import free_memory

        return free_memory(device)
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes.

    Linux's getrusage is not asked: a new process begins with the peak of the one that started it.
    """
    try:
        with Path("/proc/self/status").open(encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Bytes of memory that this process holds now; its peak so far where that is not known."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * int(os.sysconf("SC_PAGE_SIZE"))
    except OSError:
        return peak_rss()


def release_large_blocks() -> None:
    """Has the C library return large tensors to the system as soon as they are freed (glibc).

    Left alone it raises its limit for that to 32 MB as tensors come and go, and the holes that batches
    leave behind when they go on one after another add up to as much memory as they fill.
    """
    _mallopt(M_MMAP_MAX, MAPPED)
    _mallopt(M_TRIM_THRESHOLD, TRIM)
    _mallopt(M_MMAP_THRESHOLD, LARGE)


@contextmanager
def keep_freed_memory(wanted: bool) -> Iterator[None]:
    """Keeps all freed memory for the next tensor, if that is wanted; returns it in the end.

    The system clears every page that it gives: a fifth of a run goes into that where activations come
    from it anew each time, and a fifth more memory into holes where they do not.
    """
    if not wanted:
        yield
        return
    _mallopt(M_MMAP_MAX, NONE)
    _mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        release_large_blocks()
        trim_heap()


@contextmanager
def reuse_small_blocks() -> Iterator[None]:
    """Keeps freed memory for the next tensor: for work that makes and drops many of one size."""
    _mallopt(M_MMAP_THRESHOLD, LARGE_SOLVING)
    try:
        yield
    finally:
        _mallopt(M_MMAP_THRESHOLD, LARGE)
        trim_heap()


def _mallopt(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)


def trim_heap() -> None:
    """Returns freed memory to the system, where the C library can: glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
