"""An orthogonal matrix that mixes all channels of a residual stream, applied without being formed.

Turning the stream by an orthogonal Q and every weight around it the other way leaves a model's function
as it is, but spreads outlier channels over all others (QuaRot, arXiv 2404.00456; SliceGPT, arXiv
2401.15024). For a width of 2^k · m with m odd, with Hadamard's matrix H of 2^k and an orthogonal O of m,

    Q = S (H ⊗ O) / √2^k                          S: random signs
    Q = (H ⊗ I) S (H ⊗ I) (I ⊗ O) / 2^k           keeping the mean: 1 Q = 1, for layer norms

The first is the randomised Hadamard transform where m = 1. In the second, S is + where H ⊗ I puts the
mean, and O keeps the mean of its m channels.

Only sums, products and square roots of single numbers are used, in a fixed order, in float64: the same
seed gives the same bits on every machine and with any number of threads, so that a rotated checkpoint
can be checked against its source byte for byte.
"""

from __future__ import annotations

import math
import random

import torch

from roundwise.errors import ConfigError

#: Largest odd factor: its part of Q is dense, and found by plain loops.
MAX_ODD = 255


class Rotation:
    """x -> x Q for rows x of `width` channels.

    Args:
        width: channels of the stream.
        seed: of the signs and of O; the same seed gives the same Q.
        keeps_mean: Q leaves the mean of each row as it is (1 Q = 1), which layer norms need.

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
        """X Q, float64, for X [..., width] of any float dtype; X is not changed."""
        shape = X.shape
        X = X.to(torch.float64).reshape(-1, self.power, self.odd)
        X = (_hadamard(X) if self.keeps_mean else X) * self._signs
        X = _hadamard(X)
        if self.odd > 1:
            X = sum(X[..., i, None] * self._O[i] for i in range(self.odd))  # type: ignore[assignment]
        return X.reshape(shape)


def _hadamard(X: torch.Tensor) -> torch.Tensor:
    """X [rows, 2^k, m] times the Hadamard matrix over √2^k along the middle, k steps of butterflies."""
    rows, power, odd = X.shape
    half = 1
    while half < power:
        pairs = X.view(rows, power // (2 * half), 2, half * odd)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        X = torch.stack((a + b, a - b), dim=2)
        half *= 2
    return X.view(rows, power, odd) / math.sqrt(power)


def _orthogonal(size: int, generator: random.Random, *, keeps_mean: bool) -> torch.Tensor:
    """An orthogonal [size, size] matrix, float64: a product of `size` random reflections.

    With `keeps_mean` all reflect along vectors of mean zero, which leaves the mean as it is.
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
