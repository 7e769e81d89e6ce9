"""Sizes as text, memory of the machine and of this process, and freed memory that is kept."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from roundwise.errors import ConfigError
from roundwise.system.memory import (
    available_memory,
    format_size,
    parse_size,
    peak_rss,
    resident_bytes,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9), ("8G", 8 * 10**9), ("8 gb", 8 * 10**9), ("1.5GB", 1_500_000_000),
        ("512MiB", 512 << 20), ("512mib", 512 << 20), ("2Ki", 2048), ("1TB", 10**12),
        ("900", 900), ("900B", 900), (12345, 12345), (None, None),
    ],
)  # fmt: skip
def test_sizes(text: str | int | None, size: int | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8XB", "8 G B", "eight", "1e9", "i"])
def test_texts_that_are_not_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a size \(try 8GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (4_600_000, "4.6 MB"), (8 * 10**9, "8.0 GB"), (10**13, "10.0 TB")],
)
def test_sizes_as_text(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


def test_memory_of_the_machine_and_of_this_process() -> None:
    assert 10**6 < peak_rss() < 10**12
    assert 10**6 < available_memory() < 10**14
    assert 10**6 < resident_bytes() < 1.1 * peak_rss()


def test_the_peak_is_not_inherited_from_the_parent_process() -> None:
    filled = bytearray(b"1" * (300 << 20))
    code = "from roundwise.system.memory import peak_rss; print(peak_rss())"
    small = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert peak_rss() > len(filled)
    code = f"filled = bytearray(b'1' * {300 << 20}); {code}"
    large = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(large.stdout) - int(small.stdout) > 290 << 20


FAULTS = """
import resource, sys, torch
from roundwise.system.memory import keep_freed_memory, release_large_blocks, resident_bytes
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
release_large_blocks()
torch.ones(5 << 20).add(1)  # loads what torch loads on first use
with keep_freed_memory(sys.argv[1] == "keep"):
    for step in range(40):
        if step == 20:  # by now the allocator holds what it needs
            before = faults()
        x = torch.ones(5 << 20)
        y = x + 1
        del x, y
    count = faults() - before
    held = resident_bytes()
print(count, held - resident_bytes())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="needs glibc, whose settings these are"
)
def test_freed_memory_is_kept_and_returned_at_the_end() -> None:
    (faults, nothing), (fewer_faults, returned) = (
        map(
            int,
            subprocess.run(
                [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
            ).stdout.split(),
        )
        for how in ("return", "keep")
    )
    assert faults > 4 * fewer_faults
    assert nothing < 1 << 20
    assert returned > 30 << 20
