"""MinHash sketches of token windows: estimates how much two texts overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

#: Tokens per n-gram, and number of hashes in a sketch: the smallest ones, so that two sketches keep the
#: same part of what they share (bottom-k sampling, Cohen & Kaplan 2007).
GRAM, SKETCH_SIZE = 16, 1024
#: Bits of a hash: few enough to be exact in every JSON reader.
BITS = 48


def minhash(windows: Iterable[Sequence[int]]) -> list[int]:
    """Returns the smallest hashes of all n-grams of GRAM tokens, in ascending order.

    Args:
        windows: token ids of each window.
    """
    hashes = {h for window in windows for h in _hashes(torch.as_tensor(window)).tolist()}
    return sorted(hashes)[:SKETCH_SIZE]


def overlap(sketch: list[int], ids: Sequence[int]) -> float:
    """Estimates the fraction of a text's n-grams that also occur in the sketched text, 0 to 1.

    Args:
        sketch: `minhash` of the other text.
        ids: token ids of this text, by the same tokenizer.
    """
    hashes = set(_hashes(torch.as_tensor(ids)).tolist())
    if len(sketch) == SKETCH_SIZE:  # the other text's larger hashes are not known
        hashes = {value for value in hashes if value <= sketch[-1]}
    return len(hashes.intersection(sketch)) / len(hashes) if hashes else 0.0


def _hashes(ids: torch.Tensor) -> torch.Tensor:
    """Returns a hash of each n-gram of `ids` [tokens], int64 below 2^BITS: a polynomial, then mixed."""
    if len(ids) < GRAM:
        return torch.empty(0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (GRAM,), generator=generator) | 1
    mixed = (ids.long().unfold(0, GRAM, 1) * factors).sum(dim=1)  # overflow is intended
    mixed = (mixed ^ ((mixed >> 29) & (2**35 - 1))) * 0x3F58476D1CE4E5B9
    return torch.bitwise_and(mixed >> 16, 2**BITS - 1)
