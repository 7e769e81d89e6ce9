"""Randomised Hadamard transform: rotates a residual stream without forming the matrix.

Rotating the stream by an orthogonal Q and every weight around it by Qᵀ does not change a model's
function, but spreads outlier channels over all others (QuaRot, arXiv 2404.00456; SliceGPT, arXiv
2401.15024). For a width of 2^k · m with m odd, the Hadamard matrix H of size 2^k and an orthogonal
matrix O of size m,

    Q = S (H ⊗ O) / √2^k                          S: random signs
    Q = (H ⊗ I) S (H ⊗ I) (I ⊗ O) / 2^k           keeps the mean, 1 Q = 1, as layer norms need it

The first is the usual transform where m = 1. In the second, S is + where H ⊗ I puts the mean, and O
keeps the mean of its m channels.

Only sums, products and square roots of single numbers are used, in a fixed order, in float64: the same
seed gives the same bits on every machine and with any number of threads, so that `verify` can compare a
rotated checkpoint with its source byte for byte.
"""

from __future__ import annotations

import math
import random

import torch

from roundwise.errors import ConfigError

#: Largest odd factor m: O is dense and computed by plain loops.
MAX_ODD = 255


class Rotation:
    """Orthogonal map x -> x Q for rows x of `width` channels.

    Args:
        width: channels of the stream.
        seed: random seed for S and O; the same seed gives the same Q.
        keeps_mean: Q keeps the mean of each row (1 Q = 1), which layer norms need.

    Raises:
        ConfigError: the odd factor of the width is larger than `MAX_ODD`.
    """

    def __init__(self, width: int, seed: int, *, keeps_mean: bool = False) -> None:
        self.width, self.keeps_mean = width, keeps_mean
        self.power = width & -width
        self.odd = width // self.power
        if self.odd > MAX_ODD:
            raise ConfigError(
                f"a residual stream of {width} channels cannot be rotated: its odd factor {self.odd} "
                f"is larger than {MAX_ODD}; leave --rotate out"
            )
        generator = random.Random(seed)
        signs = torch.tensor([generator.choice((-1.0, 1.0)) for _ in range(width)])
        self._signs = signs.view(self.power, self.odd).to(torch.float64)
        if keeps_mean:
            self._signs[0] = 1.0
        self._O = _orthogonal(self.odd, generator, keeps_mean=keeps_mean)

    def rows(self, X: torch.Tensor) -> torch.Tensor:
        """Returns X Q in float64 for X [..., width] of any float dtype; X is not changed."""
        shape = X.shape
        X = X.to(torch.float64).reshape(-1, self.power, self.odd)
        X = (_hadamard(X) if self.keeps_mean else X) * self._signs
        X = _hadamard(X)
        if self.odd > 1:
            X = sum(X[..., i, None] * self._O[i] for i in range(self.odd))  # type: ignore[assignment]
        return X.reshape(shape)


def _hadamard(X: torch.Tensor) -> torch.Tensor:
    """Returns X [rows, 2^k, m] times the Hadamard matrix / √2^k along its middle axis: k butterflies."""
    rows, power, odd = X.shape
    half = 1
    while half < power:
        pairs = X.view(rows, power // (2 * half), 2, half * odd)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        X = torch.stack((a + b, a - b), dim=2)
        half *= 2
    return X.view(rows, power, odd) / math.sqrt(power)


def _orthogonal(size: int, generator: random.Random, *, keeps_mean: bool) -> torch.Tensor:
    """Returns an orthogonal [size, size] matrix, float64: a product of `size` random reflections.

    With `keeps_mean` all of them reflect along vectors of mean zero, which keeps the mean.
    """
    rows = [[float(i == j) for j in range(size)] for i in range(size)]
    for _ in range(size if size > 1 else 0):
        v = [generator.uniform(-1.0, 1.0) for _ in range(size)]
        if keeps_mean:
            middle = math.fsum(v) / size
            v = [x - middle for x in v]
        norm = math.fsum(x * x for x in v)
        for row in rows:
            part = 2.0 * math.fsum(x * y for x, y in zip(row, v, strict=True)) / norm
            row[:] = [x - part * y for x, y in zip(row, v, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)
