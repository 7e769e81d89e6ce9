"""The kernel for CUDA devices: Triton programs that dequantize while they multiply.

Words of 2, 4 and 8 bits stay as the file has them. 3 bit codes straddle words there, so each 32 of a
column are laid out anew, in the same three words:

    word 0   nibble j:   low bits of code 8 + j · low bits of code j
    word 1   nibble j:   low bits of code 24 + j · low bits of code 16 + j
    word 2   nibble j:   high bits of code 24 + j, 16 + j, 8 + j, j

With act-order the input channels are sorted by group once, and the product gathers x in that order. What
the programs know of groups is one size; where that cannot be, or is no multiple of 32, the group of each
channel is looked up and weights are multiplied as float32: right, and slower.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import ClassVar

import torch

from roundwise.core.packing import pack, unpack
from roundwise.inference.kernels.base import PackedWeight
from roundwise.inference.kernels.triton_op import simulated


class TritonKernel:
    """Fused dequantization and product on a GPU, exact but for the order of float32 sums.

    Up to DECODE_ROWS rows of x, a row's result is the same bits whatever the others are and however many
    they are. Longer inputs are tiled, and summed, otherwise.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, weight: PackedWeight) -> None:
        self.bits, self.zero_offset = weight.bits, weight.zero_offset
        self.qzeros, self.g_idx = weight.qzeros, weight.g_idx
        self.scales = weight.scales.contiguous()
        groups = weight.channel_groups()
        #: int32 [in]: which channel of x comes at each place; None: their own order.
        self.order: torch.Tensor | None = None
        #: int32 [in]: the group of each channel; None: each `group_size` in a row are one.
        self.groups: torch.Tensor | None = None
        by_group, order = torch.sort(groups, stable=True)
        self.group_size = int((by_group == by_group[0]).sum())
        places = torch.arange(len(groups), device=groups.device)
        even = torch.equal(by_group, places // self.group_size)
        if not even or (self.group_size % 32 and self.group_size < len(groups)):
            self.group_size, self.groups = 0, groups.to(torch.int32)
        elif not torch.equal(by_group, groups):
            self.order = order.to(torch.int32)
        #: int32 [in·bits/32, out]: the codes.
        self.words = weight.qweight.contiguous()
        if self.order is not None or self.bits == 3:
            codes = unpack(self.words, self.bits)
            self.words = _words(codes if self.order is None else codes[order], self.bits)
        #: uint8 [groups, out]: zero points; None: they are all `zero`.
        self.zeros: torch.Tensor | None = weight.zeros().to(torch.uint8).contiguous()
        self.zero = int(self.zeros[0, 0])
        if bool((self.zeros == self.zero).all()):
            self.zeros = None
        else:
            self.zero = -1

    @classmethod
    def why_not(cls, weight: PackedWeight) -> str | None:
        """Why it cannot compute with this weight where it lies; None if it can."""
        device = weight.qweight.device
        if not _installed():
            return "triton is not installed: pip install 'roundwise[triton]'"
        if device.type == "cuda":
            if _capability(device.index) < (8, 0):
                return "it takes a GPU of compute capability 8.0 or newer"
        elif not (device.type == "cpu" and simulated()):
            return f"it runs on CUDA devices, and the weight is on {device.type}"
        if weight.qweight.numel() >= 2**31:
            return "it counts the words of a layer in 31 bits, and there are more"
        return None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in] -> [..., out]."""
        y: torch.Tensor = torch.ops.roundwise.triton_linear(
            x, self.words, self.scales, self.zeros, self.order, self.groups,
            self.bits, self.zero, self.group_size,
        )  # fmt: skip
        return y

    def packed(self) -> PackedWeight:
        """The weight in the file's layout: as it is, unless its codes were laid out anew."""
        qweight = self.words
        if self.order is not None or self.bits == 3:
            codes = _codes(self.words, self.bits)
            if self.order is not None:
                codes = codes[torch.argsort(self.order)]
            qweight = pack(codes, self.bits)
        return PackedWeight(
            qweight, self.qzeros, self.scales, self.g_idx, self.bits, self.zero_offset
        )


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [in, out] -> int32 [in·bits/32, out], in the layout of the programs."""
    if bits != 3:
        return pack(codes, bits)
    n = codes.shape[1]
    eights = codes.view(-1, 4, 8, n)  # of each 32 codes of a column
    low, high = eights & 3, eights >> 2
    nibbles = torch.stack(
        [
            low[:, 0] | low[:, 1] << 2,
            low[:, 2] | low[:, 3] << 2,
            high[:, 0] | high[:, 1] << 1 | high[:, 2] << 2 | high[:, 3] << 3,
        ],
        dim=1,
    )
    return pack(nibbles.reshape(-1, n), 4)


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_words`."""
    if bits != 3:
        return unpack(words, bits)
    n = words.shape[1]
    nibbles = unpack(words, 4).view(-1, 3, 8, n)
    high = nibbles[:, 2]
    eights = [
        nibbles[:, lane // 2] >> (2 * (lane % 2)) & 3 | (high >> lane & 1) << 2 for lane in range(4)
    ]
    return torch.stack(eights, dim=1).reshape(-1, n)
