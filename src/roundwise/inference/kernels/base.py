"""What a kernel is: a layout of the packed weights, and a product with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from roundwise.core.quantized_weight import unpack


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight as the file format holds it: W[o, i] = scale · (code - zero) of i's group.

    Attributes:
        qweight: int32 [in·bits/32, out], codes packed along the input channels.
        qzeros: int32 [groups, out·bits/32], zero points packed along the output channels.
        scales: float16, bfloat16 or float32 [groups, out].
        g_idx: int32 [in], the group of each input channel; None: channel order, groups of equal size.
        bits: 2, 3, 4 or 8.
        zero_offset: 1 if zero points are stored minus one (v1), else 0.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor | None
    bits: int
    zero_offset: int

    @property
    def in_features(self) -> int:
        """Input channels."""
        return self.qweight.shape[0] * 32 // self.bits

    @property
    def out_features(self) -> int:
        """Output channels."""
        return self.qweight.shape[1]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.scales.shape[0]

    def channel_groups(self) -> torch.Tensor:
        """int64 [in]: the group of each input channel."""
        if self.g_idx is not None:
            return self.g_idx.long()
        size = -(-self.in_features // self.groups)
        return torch.arange(self.in_features, device=self.qweight.device) // size

    def zeros(self) -> torch.Tensor:
        """int32 [groups, out]: zero points, as they are meant."""
        stored = unpack(self.qzeros.T.contiguous(), self.bits).T.to(torch.int32)
        zeros: torch.Tensor = (stored + self.zero_offset) & (2**self.bits - 1)
        return zeros

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as [in, out]: the transpose of a linear's, which is how it is stored."""
        codes = unpack(self.qweight, self.bits).to(torch.float32)
        groups = self.channel_groups()
        scales = self.scales.to(torch.float32)
        weight: torch.Tensor = codes.sub_(self.zeros()[groups]).mul_(scales[groups]).to(dtype)
        return weight


class Kernel(Protocol):
    """A way to compute with one packed weight, made from it once and called for every product.

    A kernel may keep the tensors of the `PackedWeight` as they are or lay them out anew; in that case
    it holds the only copy, and `packed()` gives back what it was made from, bit for bit.
    """

    #: What `bench`, the model's repr and ROUNDWISE_KERNEL call it.
    name: ClassVar[str]

    def __init__(self, weight: PackedWeight) -> None: ...

    @classmethod
    def why_not(cls, weight: PackedWeight) -> str | None:
        """Why it cannot compute with this weight where it lies; None if it can."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in] times the weight: [..., out], in x's dtype (float32, float16, bfloat16)."""
        ...

    def packed(self) -> PackedWeight:
        """The weight in the file's layout."""
        ...
