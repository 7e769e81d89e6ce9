"""Finds rows of matrices by their values: hashes of rows, and an index of the rows of many matrices.

It knows numbers and names, but no files. Equal hashes do not prove that rows are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: Bytes hashed at a time.
CHUNK = 1 << 24


def hash_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Returns a hash of each row's bits, int64 [rows].

    Args:
        matrix: [rows, columns], of a type with 2 or 4 bytes.
    """
    row_bytes = matrix.shape[1] * matrix.element_size()
    # Eight bytes at a time if rows can be cut so: a sum with odd factors, modulo 2^64.
    word = next(
        dtype
        for dtype in (torch.int64, torch.int32, torch.int16)
        if row_bytes % dtype.itemsize == 0
    )
    generator = torch.Generator().manual_seed(0)
    count = row_bytes // word.itemsize
    factors = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator) | 1
    hashes = torch.empty(len(matrix), dtype=torch.int64)
    step = max(1, CHUNK // max(1, row_bytes))
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        words = matrix[rows].contiguous().view(word).to(torch.int64)
        # The high half takes part too: without it, the last value of a word would count for less.
        hashes[rows] = ((words ^ (words >> 29)) * factors).sum(1)
    return hashes


@dataclass(frozen=True, eq=False)
class FoundRows:
    """The places where the rows of a matrix were found."""

    names: tuple[str, ...]
    source: torch.Tensor
    """int64 [rows]: index into `names`."""
    row: torch.Tensor
    """int64 [rows]: the row in that matrix."""


class RowIndex:
    """All rows of some matrices, by their hashes.

    Args:
        hashes: name of each matrix -> hashes of its rows, int64 [rows].
    """

    def __init__(self, hashes: Mapping[str, torch.Tensor]) -> None:
        self.names = [*hashes]
        counts = torch.tensor([len(rows) for rows in hashes.values()], dtype=torch.int64)
        rows = [torch.arange(count) for count in counts.tolist()]
        empty = torch.empty(0, dtype=torch.int64)
        self._hash, order = torch.cat([empty, *hashes.values()]).sort(stable=True)
        self._row = torch.cat([empty, *rows])[order]
        self._source = torch.repeat_interleave(torch.arange(len(counts)), counts)[order]
        self._whole: dict[tuple[int, int], list[str]] = {}
        for name, of_rows in hashes.items():
            self._whole.setdefault(_of_all(of_rows), []).append(name)

    def find(self, hashes: torch.Tensor, preference: Callable[[str], Any]) -> FoundRows | None:
        """Returns where all rows of a matrix are; None: one of them is nowhere.

        A matrix with the same rows in the same order comes first. A row that several matrices have is
        taken from one that other rows are taken from, then from the one with the highest preference;
        the first of several equal rows is the first there.

        Args:
            hashes: hashes of its rows, int64 [rows].
            preference: returns how likely a matrix of this name is the right one; higher is likelier.
        """
        if same := self._whole.get(_of_all(hashes)):
            name = max(same, key=preference)
            return FoundRows((name,), torch.zeros_like(hashes), torch.arange(len(hashes)))
        first = torch.searchsorted(self._hash, hashes)
        count = torch.searchsorted(self._hash, hashes, right=True) - first
        if not len(hashes) or not bool((count > 0).all()):
            return None
        several = count > 1
        certain = {*torch.unique(self._source[first[~several]]).tolist()}
        place = first.clone()
        choices: dict[int, list[int]] = {}
        for target in several.nonzero().flatten().tolist():
            start = int(first[target])
            if start not in choices:
                places = range(start, start + int(count[target]))
                choices[start] = self._by_preference(places, certain, preference)
            left = choices[start]
            place[target] = left.pop(0) if len(left) > 1 else left[0]
        used, source = torch.unique(self._source[place], return_inverse=True)
        names = tuple(self.names[index] for index in used.tolist())
        return FoundRows(names, source, self._row[place])

    def _by_preference(
        self, places: range, certain: set[int], preference: Callable[[str], Any]
    ) -> list[int]:
        """Returns places of equal rows, the likeliest first, otherwise in order."""
        sources = {place: int(self._source[place]) for place in places}
        scores = {
            source: (source in certain, preference(self.names[source]))
            for source in {*sources.values()}
        }
        best = max(scores.values())
        likely = [place for place in places if scores[sources[place]] == best]
        return likely or [*places]


def _of_all(hashes: torch.Tensor) -> tuple[int, int]:
    """Returns a key of a matrix: the number of its rows, and a hash of all their hashes in order."""
    return len(hashes), int(hash_rows(hashes.reshape(1, -1))) if len(hashes) else 0
