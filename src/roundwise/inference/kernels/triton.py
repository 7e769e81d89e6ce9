"""The kernel for CUDA devices: Triton programs that dequantize while they multiply.

Words of 2, 4 and 8 bits stay as the file has them. 3 bit codes straddle words there, so each 32 of a
column are laid out anew, in the same three words:

    word 0   nibble j:   low bits of code 8 + j · low bits of code j
    word 1   nibble j:   low bits of code 24 + j · low bits of code 16 + j
    word 2   nibble j:   high bits of code 24 + j, 16 + j, 8 + j, j

With act-order the input channels are sorted by group once, and the product gathers x in that order. What
the programs know of groups is one size; where that cannot be, or is no multiple of 32, the group of each
channel is looked up and weights are multiplied as float32: right, and slower.

The custom op `roundwise::triton_linear`: how a product is cut for a GPU, and its launch.

It takes tensors and integers, allocates from torch's allocator only (the output, and the sums of a
split), never waits for the device, and always adds in the same order. So it can be captured in a CUDA
graph and compiled around, and what calls it can be copied and pickled. Nothing is tuned at run time. The
first product of a kind compiles its program: a graph is captured after a product of the same shape.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache, lru_cache
from typing import Any, ClassVar, NamedTuple

import torch

from roundwise.core.quantized_weight import pack, unpack
from roundwise.errors import ConfigError
from roundwise.inference.kernels.base import PackedWeight

#: Bits of 2^23 as float32; see `triton_kernels`.
MAGIC = 0x4B000000

#: Up to as many rows of x count as decoding: few enough for one tensor core instruction.
DECODE_ROWS = 16


def simulated() -> bool:
    """Whether Triton programs run in its interpreter, on any device: for tests and debugging."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


@cache
def _programs() -> Any:
    """The Triton programs, which need triton."""
    from roundwise.inference.kernels import triton_kernels

    return triton_kernels


class Device(NamedTuple):
    """What a tiling depends on."""

    processors: int
    """Multiprocessors."""
    shared: int
    """Bytes of shared memory that a program may have."""


@cache
def _device(index: int | None) -> Device:
    """Of a CUDA device; None: what the interpreter plays, few so that small products split as well."""
    if index is None:
        return Device(8, 232448)
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 65536)  # not of AMD's
    return Device(properties.multi_processor_count, shared)


class Tiling(NamedTuple):
    """How a product is cut: tiles of BM rows and BN output channels, summed over BK channels a step."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    crowd: int
    """Programs that each processor shall have before the input channels are left in one piece."""

    def shared(self, bits: int, size: int) -> int:
        """Bytes of shared memory that a program takes at most.

        All stages hold x and words; weights are there once.
        """
        words = self.BN * self.BK * bits // 8
        grids = self.BN * 8  # scales and zero points
        return self.stages * (self.BM * self.BK * size + words + grids) + self.BN * self.BK * 2

    def splits(self, rows: int, channels: int, outputs: int, device: Device) -> int:
        """Into how many parts the input channels are cut so that all processors have work.

        A part has four steps at least: shorter ones would only wait for their first words.
        """
        tiles = -(-rows // self.BM) * -(-outputs // self.BN)
        steps = -(-channels // self.BK)
        return max(1, min(self.crowd * device.processors // tiles, steps // 4))


def tiling(rows: int, outputs: int, run: int, bits: int, size: int, device: Device) -> Tiling:
    """The tiling of a product; chosen from the machine code that each gives for compute capability 9.0.

    Decoding waits for memory, as long as instructions do not get in the way: they are 4.3 for each 4 bit
    code where a tile has 128 output channels and 5.1 where it has 64, which gives narrow layers twice
    the tiles. Two programs on each processor load while the other computes. Longer inputs get tiles as
    long as they are: a weight is dequantized once for all BM rows. Sums of 128 · 128, in eight warps,
    are the most that the registers hold.

    Args:
        rows: of x.
        outputs: output channels.
        run: input channels in a row that share a group; 0 if each is looked up.
        bits: of a code.
        size: bytes of an element of x.
        device: that computes.
    """
    BK = min(128, run & -run)
    if not run:  # weights are float32 and multiplied in three parts
        return Tiling(16 if rows <= DECODE_ROWS else 64, 64, 32, 4, 2, 2)
    if rows <= DECODE_ROWS:
        wide = 2 * -(-outputs // 128) >= device.processors
        cut = Tiling(16, 128 if wide else 64, BK, 4, 4 if size == 2 else 3, 2)
    elif rows <= 32:
        cut = Tiling(32, 64, BK, 4, 4 if size == 2 else 3, 2)
    elif size == 4:
        cut = Tiling(64, 128, min(BK, 64), 8, 2, 1)
    else:
        cut = Tiling(64 if rows <= 64 else 128, 128, BK, 8, 3, 1)
    while cut.shared(bits, size) > device.shared and cut.BK > 32:
        cut = cut._replace(BK=cut.BK // 2)
    return cut


class Plan(NamedTuple):
    """A product, ready for launch."""

    tiling: Tiling
    splits: int
    tiles_per_split: int
    tiles_per_group: int


@lru_cache(4096)
def plan(
    rows: int, channels: int, outputs: int, group_size: int, bits: int, size: int, device: Device
) -> Plan:
    """Cuts a product; `group_size` 0: the group of each channel is looked up. Else as `tiling`."""
    whole = group_size >= channels
    cut = tiling(rows, outputs, 128 if whole else group_size, bits, size, device)
    steps = -(-channels // cut.BK)
    share = -(-steps // cut.splits(rows, channels, outputs, device))
    return Plan(cut, -(-steps // share), share, steps if whole else max(1, group_size // cut.BK))


def _linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    groups: torch.Tensor | None,
    bits: int,
    zero: int,
    group_size: int,
) -> torch.Tensor:
    """X [..., in] times the weight: [..., out]."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return _linear(x, words, scales, zeros, order, groups, bits, zero, group_size)
    if not x.is_cuda and not simulated():
        raise ConfigError(
            f"triton_linear runs on CUDA devices, not on {x.device.type}; "
            "TRITON_INTERPRET=1 simulates one"
        )
    *shape, channels = x.shape
    outputs = scales.shape[1]
    if channels != words.shape[0] * 32 // bits:
        raise ValueError(
            f"x has {channels} channels, and the weight takes {words.shape[0] * 32 // bits}"
        )
    x = x.reshape(-1, channels)
    rows = len(x)
    # Triton's interpreter rounds to bfloat16 by cutting off: torch rounds for it.
    y = x.new_empty(*shape, outputs, dtype=torch.float32 if simulated() else x.dtype)
    if not rows:
        return y.to(x.dtype)
    if order is not None:
        x = x.index_select(1, order)
    elif x.stride(1) != 1:
        x = x.contiguous()
    device = _device(x.device.index if x.is_cuda else None)
    cut, splits, per_split, per_group = plan(
        rows, channels, outputs, group_size, bits, x.element_size(), device
    )
    parts = y
    if splits > 1:
        parts = x.new_empty(splits, rows, outputs, dtype=torch.float32)
    programs = _programs()
    programs.tiles[-(-rows // cut.BM), -(-outputs // cut.BN), splits](
        x, words, scales, words if zeros is None else zeros, words if groups is None else groups,
        parts, rows, outputs, channels, x.stride(0), per_group, per_split, MAGIC,
        BITS=bits, ZERO=zero, SCATTERED=groups is not None,
        BM=cut.BM, BN=cut.BN, BK=cut.BK, STAGES=cut.stages, num_warps=cut.warps,
    )  # fmt: skip
    if splits > 1:
        size = rows * outputs
        programs.total[(-(-size // 1024),)](parts, y, size, SPLITS=splits, BLOCK=1024, num_warps=4)
    return y.to(x.dtype)


def _shape(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, *_: Any) -> torch.Tensor:
    """What `_linear` returns, without its values: for torch.compile."""
    return x.new_empty(*x.shape[:-1], scales.shape[1])


# The low level of torch.library: `torch.library.custom_op` adds microseconds to every call.
_LIBRARY: Any = torch.library.Library("roundwise", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "triton_linear(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? order, "
    "Tensor? groups, int bits, int zero, int group_size) -> Tensor"
)
_LIBRARY.impl("triton_linear", _linear, "CUDA")
_LIBRARY.impl("triton_linear", _linear, "CPU")  # Triton's interpreter
torch.library.register_fake("roundwise::triton_linear", _shape, lib=_LIBRARY)


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
