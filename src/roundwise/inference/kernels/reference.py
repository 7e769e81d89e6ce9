"""The kernel that needs nothing but torch: unpack, dequantize, multiply."""

from __future__ import annotations

from typing import ClassVar

import torch

from roundwise.inference.kernels.base import PackedWeight


class ReferenceKernel:
    """Correct for every width, group size, zero point, order and device, and slow."""

    name: ClassVar[str] = "reference"

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight

    @classmethod
    def why_not(cls, weight: PackedWeight) -> str | None:
        """Nothing stops it."""
        return None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in] -> [..., out]."""
        return x @ self.weight.dequantize(x.dtype)

    def packed(self) -> PackedWeight:
        """The weight it was made from."""
        return self.weight
