"""Interface of a kernel, and the packed weight that it is made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from roundwise.core.quantized_weight import unpack


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight in the layout of the GPTQ file format.

    W[o, i] = scale · (code - zero), with the scale and zero point of output o and the group of input i.

    Attributes:
        qweight: int32 [in·bits/32, out], codes packed along the input channels.
        qzeros: int32 [groups, out·bits/32], zero points packed along the output channels.
        scales: float16, bfloat16 or float32 [groups, out].
        g_idx: int32 [in], the group of each input channel; None: consecutive groups of equal size.
        bits: 2 to 8.
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
        """Number of input channels."""
        return self.qweight.shape[0] * 32 // self.bits

    @property
    def out_features(self) -> int:
        """Number of output channels."""
        return self.qweight.shape[1]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.scales.shape[0]

    def channel_groups(self) -> torch.Tensor:
        """Returns the group of each input channel, int64 [in]."""
        if self.g_idx is not None:
            return self.g_idx.long()
        size = -(-self.in_features // self.groups)
        return torch.arange(self.in_features, device=self.qweight.device) // size

    def zeros(self) -> torch.Tensor:
        """Returns the zero points, int32 [groups, out], without the offset of the file."""
        stored = unpack(self.qzeros.T.contiguous(), self.bits).T.to(torch.int32)
        zeros: torch.Tensor = (stored + self.zero_offset) & (2**self.bits - 1)
        return zeros

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the weight [in, out], the transpose of a linear's: codes are stored in this order."""
        codes = unpack(self.qweight, self.bits).to(torch.float32)
        groups = self.channel_groups()
        scales = self.scales.to(torch.float32)
        weight: torch.Tensor = codes.sub_(self.zeros()[groups]).mul_(scales[groups]).to(dtype)
        return weight


def kernel_width(bits: int) -> int:
    """Returns the width in which kernels keep codes: 5, 6 and 7 bits are widened to 8."""
    return 8 if bits in (5, 6, 7) else bits


class Kernel(Protocol):
    """Computes products with one packed weight: made once from it, then called for every product.

    A kernel may keep the tensors of the `PackedWeight`, or copy them to a layout of its own. It then has
    the only copy, and `packed()` restores what it was made from, bit for bit.
    """

    #: Name of the kernel in `bench`, in the model's repr and for ROUNDWISE_KERNEL.
    name: ClassVar[str]

    def __init__(self, weight: PackedWeight) -> None: ...

    @classmethod
    def unsupported_reason(cls, weight: PackedWeight) -> str | None:
        """Returns why the kernel cannot compute with this weight on its device; None if it can."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies x [..., in] with the weight.

        Args:
            x: float32, float16 or bfloat16.

        Returns:
            [..., out] in the dtype of x.
        """
        ...

    def packed(self) -> PackedWeight:
        """Returns the weight in the layout of the file."""
        ...
