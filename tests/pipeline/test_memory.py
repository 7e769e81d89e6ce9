"""Sizes in words, and the mode that fits a budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from roundwise.errors import ConfigError
from roundwise.models.skeleton import open_skeleton
from roundwise.pipeline.memory import available, choose_mode, parse_size, peak_rss


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
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size: write it as 8GB"):
        parse_size(text)


def test_the_mode_follows_the_budget(llama: Path) -> None:
    skeleton = open_skeleton(llama)
    # Per token 96 + 4·64 numbers of 4 bytes.
    needed = 1000 * (96 + 4 * 64) * 4
    for reference in (False, True):
        budget = (1 + reference) * needed
        assert choose_mode(skeleton, 1000, budget, reference=reference) == "true_sequential"
        assert choose_mode(skeleton, 1000, budget - 1, reference=reference) == "block"
    assert choose_mode(skeleton, 1000, None, reference=False) == "true_sequential"
    assert choose_mode(skeleton, 10**12, None, reference=False) == "block"


def test_what_this_machine_has() -> None:
    assert 10**6 < peak_rss() < 10**12
    assert 10**6 < available() < 10**14
