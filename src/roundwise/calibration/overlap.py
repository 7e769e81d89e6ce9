"""A small sketch of the calibration text: enough to say later whether another text overlaps with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

#: Tokens that are compared as one, and how many hashes are kept: the smallest ones, so that two sketches
#: keep the same part of what they share (bottom-k sampling, Cohen & Kaplan 2007).
GRAM, KEPT = 16, 1024
#: Hashes have this many bits, so that they are exact in every reader of JSON.
BITS = 48


def minhash(windows: Iterable[Sequence[int]]) -> list[int]:
    """The smallest hashes of all runs of GRAM tokens, in ascending order."""
    found = {h for window in windows for h in _hashes(torch.as_tensor(window)).tolist()}
    return sorted(found)[:KEPT]


def overlap(known: list[int], ids: Sequence[int]) -> float:
    """Estimated part of a text's runs of GRAM tokens that are in the sketched text too, 0 … 1.

    Args:
        known: what `minhash` kept of the other text.
        ids: token ids of this one, by the same tokenizer.
    """
    hashes = set(_hashes(torch.as_tensor(ids)).tolist())
    if len(known) == KEPT:  # the other text's larger hashes are not known
        hashes = {value for value in hashes if value <= known[-1]}
    return len(hashes.intersection(known)) / len(hashes) if hashes else 0.0


def _hashes(ids: torch.Tensor) -> torch.Tensor:
    """A hash of each run of GRAM tokens, int64 below 2^BITS; a polynomial, then mixed."""
    if len(ids) < GRAM:
        return torch.empty(0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (GRAM,), generator=generator) | 1
    mixed = (ids.long().unfold(0, GRAM, 1) * factors).sum(dim=1)  # wraps around, as meant
    mixed = (mixed ^ ((mixed >> 29) & (2**35 - 1))) * 0x3F58476D1CE4E5B9
    return torch.bitwise_and(mixed >> 16, 2**BITS - 1)
