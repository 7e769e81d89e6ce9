"""GPU kernel: Triton programs that dequantize codes while they multiply (triton_kernels.py).

This module prepares a weight (`TritonKernel`); `triton_launch` launches the programs.

Words of 2, 4 and 8 bits stay as in the file; 5, 6 and 7 bits are widened to 8. 3-bit codes would
straddle words, so each 32 codes of an output channel are stored in another layout, in three words as
before (nibble j is bits 4j to 4j + 3):

    word 0   nibble j:   low bits of code 8 + j · low bits of code j
    word 1   nibble j:   low bits of code 24 + j · low bits of code 16 + j
    word 2   nibble j:   high bits of code 24 + j, 16 + j, 8 + j, j

With act-order the input channels are sorted by group once, and each product gathers x in that order.
The programs need a single group, or groups of one size that is a multiple of 32. For others they look
up the group of each channel and multiply weights as float32: correct, but slower.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import ClassVar

import torch

from roundwise.core.quantized_weight import pack, unpack
from roundwise.inference.kernels.base import PackedWeight, kernel_width
from roundwise.inference.kernels.triton_launch import (
    is_interpreted,
)
from roundwise.version import install_command


class TritonKernel:
    """Dequantizes and multiplies in one program on a GPU; exact except for the order of float32 sums.

    For up to DECODE_ROWS rows of x, the result of a row has the same bits whatever the other rows are
    and however many there are. Longer inputs are tiled, and summed, in another way.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, weight: PackedWeight) -> None:
        self.bits, self.zero_offset = weight.bits, weight.zero_offset
        self.qzeros, self.g_idx = weight.qzeros, weight.g_idx
        self.scales = weight.scales.contiguous()
        groups = weight.channel_groups()
        #: int32 [in]: channel of x at each position; None: the order of the file.
        self.order: torch.Tensor | None = None
        #: int32 [in]: group of each channel; None: groups are `group_size` consecutive channels.
        self.groups: torch.Tensor | None = None
        sorted_groups, order = torch.sort(groups, stable=True)
        self.group_size = int((sorted_groups == sorted_groups[0]).sum())
        positions = torch.arange(len(groups), device=groups.device)
        equal_sizes = torch.equal(sorted_groups, positions // self.group_size)
        if not equal_sizes or (self.group_size % 32 and self.group_size < len(groups)):
            self.group_size, self.groups = 0, groups.to(torch.int32)
        elif not torch.equal(sorted_groups, groups):
            self.order = order.to(torch.int32)
        #: Width of the codes in `words`.
        self.width = kernel_width(self.bits)
        self.is_repacked = self.order is not None or self.bits == 3 or self.width != self.bits
        #: int32 [in·width/32, out]: the codes.
        self.words = weight.qweight.contiguous()
        if self.is_repacked:
            codes = unpack(self.words, self.bits)
            self.words = _pack_words(codes if self.order is None else codes[order], self.width)
        #: uint8 [groups, out]: zero points; None: all of them are `zero`.
        self.zeros: torch.Tensor | None = weight.zeros().to(torch.uint8).contiguous()
        self.zero = int(self.zeros[0, 0])
        if bool((self.zeros == self.zero).all()):
            self.zeros = None
        else:
            self.zero = -1

    @classmethod
    def unsupported_reason(cls, weight: PackedWeight) -> str | None:
        """Returns a reason if triton or a recent CUDA device is missing, and for huge weights."""
        device = weight.qweight.device
        if not _is_installed():
            return f"triton is not installed: {install_command('triton')}"
        if device.type == "cuda":
            if _compute_capability(device.index) < (8, 0):
                return "it needs a GPU of compute capability 8.0 or newer"
        elif not (device.type == "cpu" and is_interpreted()):
            return f"it runs on CUDA devices, but the weight is on {device.type}"
        if weight.qweight.numel() >= 2**31:
            return "it supports fewer than 2^31 words per layer"
        return None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies x [..., in] with the weight; returns [..., out]."""
        y: torch.Tensor = torch.ops.roundwise.triton_linear(
            x, self.words, self.scales, self.zeros, self.order, self.groups,
            self.width, self.zero, self.group_size,
        )  # fmt: skip
        return y

    def packed(self) -> PackedWeight:
        """Returns the weight it was made from."""
        qweight = self.words
        if self.is_repacked:
            codes = _unpack_words(self.words, self.width)
            if self.order is not None:
                codes = codes[torch.argsort(self.order)]
            qweight = pack(codes, self.bits)
        return PackedWeight(
            qweight, self.qzeros, self.scales, self.g_idx, self.bits, self.zero_offset
        )


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _compute_capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes uint8 [in, out] into words int32 [in·bits/32, out], in the layout of the programs."""
    if bits != 3:
        return pack(codes, bits)
    n = codes.shape[1]
    eights = codes.view(-1, 4, 8, n)  # the 32 codes of a block as 4 lanes of 8
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


def _unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpacks words to codes: the inverse of `_pack_words`."""
    if bits != 3:
        return unpack(words, bits)
    n = words.shape[1]
    nibbles = unpack(words, 4).view(-1, 3, 8, n)
    high = nibbles[:, 2]
    eights = [
        nibbles[:, lane // 2] >> (2 * (lane % 2)) & 3 | (high >> lane & 1) << 2 for lane in range(4)
    ]
    return torch.stack(eights, dim=1).reshape(-1, n)
