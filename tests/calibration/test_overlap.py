"""Sketches of texts, and the overlap that they estimate."""

import pytest
import torch

from roundwise.calibration.overlap import GRAM, SKETCH_SIZE, minhash, overlap


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(4096, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_text_overlaps_fully_with_itself_and_not_with_another():
    text = tokens(20_000, 0)
    assert overlap(minhash([text]), text) == 1.0
    assert overlap(minhash([text]), tokens(20_000, 1)) == 0.0


@pytest.mark.parametrize("part", [0.1, 0.5])
def test_a_part_is_estimated(part):
    text, other = tokens(40_000, 0), tokens(40_000, 1)
    mixed = text[: int(part * 40_000)] + other[int(part * 40_000) :]
    assert overlap(minhash([text]), mixed) == pytest.approx(part, abs=0.05)


def test_windows_of_the_same_text_at_other_offsets():
    text = tokens(20_000, 0)
    windows = [text[i : i + 500] for i in range(7, 19_500, 500)]
    assert overlap(minhash(windows), text) > 0.9


def test_short_and_empty_texts():
    assert minhash([]) == []
    assert minhash([list(range(GRAM - 1))]) == []
    assert overlap([], tokens(100, 0)) == 0.0
    assert overlap(minhash([tokens(100, 0)]), []) == 0.0


def test_a_sketch_is_small_sorted_and_exact_in_json():
    sketch = minhash([tokens(100_000, 0)])
    assert len(sketch) == SKETCH_SIZE
    assert sketch == sorted(set(sketch))
    assert all(0 <= value < 2**53 for value in sketch)
