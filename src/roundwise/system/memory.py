"""Memory: sizes as text, how much is available and in use, and how much freed memory glibc keeps."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from roundwise.errors import ConfigError

if TYPE_CHECKING:
    import torch

#: glibc's numbers of the options of mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
#: Allocations of at least this many bytes return to the system as soon as they are freed: normally, and
#: while solving, whose temporaries (core.solver.ROW_WORKSPACE entries) are smaller and whose results are
#: larger.
LARGE, LARGE_SOLVING = 1 << 20, 6 << 20
#: glibc's defaults of M_TRIM_THRESHOLD and M_MMAP_MAX, and the values that keep all freed memory.
DEFAULT_TRIM_THRESHOLD, DEFAULT_MMAP_MAX = 128 << 10, 1 << 16
NEVER_TRIM, NO_MMAP = (1 << 31) - 1, 0

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", start=1)}


def parse_size(text: str | int | None) -> int | None:
    """Returns the bytes of a size such as 8GB, 512MiB or 900M; None for None.

    Raises:
        ConfigError: the text is not a size.
    """
    if text is None or isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?)B?\s*", text, flags=re.IGNORECASE)
    unit = match[2].upper().replace("I", "i") if match else "?"
    if match is None or unit not in UNITS:
        raise ConfigError(f"{text!r} is not a size (try 8GB, 512MiB or 900MB)")
    return int(float(match[1]) * UNITS[unit])


def format_size(nbytes: int) -> str:
    """Returns a size in bytes as text, such as "4.6 MB"."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def available_memory(device: torch.device | None = None) -> int:
    """Returns the bytes that a device can still allocate without swapping; None: the CPU."""
    if device is not None and device.type != "cpu":
        from roundwise.system.device import free_memory

        return free_memory(device)
    return int(psutil.virtual_memory().available)


def resident_bytes() -> int:
    """Returns the resident memory of this process in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """Returns the peak resident memory of this process so far, in bytes.

    On Linux, getrusage is only a fallback: a new process inherits the peak of the one that started it.
    psutil reports no peak there.
    """
    try:
        with Path("/proc/self/status").open(encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_large_blocks() -> None:
    """Makes the C library return large tensors to the system as soon as they are freed (glibc).

    By default glibc raises its threshold for that up to 32 MB as tensors come and go. The holes that
    batches then leave in the heap, as they resume one after another, take as much memory as their
    tensors.
    """
    _mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
    _mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM_THRESHOLD)
    _mallopt(M_MMAP_THRESHOLD, LARGE)


@contextmanager
def keep_freed_memory(enabled: bool) -> Iterator[None]:
    """Context manager: keeps all freed memory for the next tensors, and returns it at the end.

    The system clears every page that it hands out. If activations get new pages each time, a fifth of a
    run is spent on that; if freed memory is kept, holes take a fifth more memory.

    Args:
        enabled: False makes this a no-op.
    """
    if not enabled:
        yield
        return
    _mallopt(M_MMAP_MAX, NO_MMAP)
    _mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)
    try:
        yield
    finally:
        release_large_blocks()
        trim_heap()


@contextmanager
def reuse_small_blocks() -> Iterator[None]:
    """Context manager: keeps freed tensors below `LARGE_SOLVING` for reuse.

    For work that allocates and frees many tensors of one size.
    """
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
    """Returns freed memory to the system; glibc keeps it otherwise. A no-op with other C libraries."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
