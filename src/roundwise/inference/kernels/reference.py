"""Reference kernel in plain torch: unpacks, dequantizes and multiplies."""

from __future__ import annotations

from typing import ClassVar

import torch

from roundwise.inference.kernels.base import PackedWeight


class ReferenceKernel:
    """Supports every width, group size, zero point, channel order and device; slow."""

    name: ClassVar[str] = "reference"

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight

    @classmethod
    def unsupported_reason(cls, weight: PackedWeight) -> str | None:
        """Returns None: always available."""
        return None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies x [..., in] with the weight; returns [..., out]."""
        return x @ self.weight.dequantize(x.dtype)

    def packed(self) -> PackedWeight:
        """Returns the weight it was made from."""
        return self.weight
