"""The kernel for CUDA devices: Triton programs that dequantize while they multiply.

Words of 2, 4 and 8 bits stay as the file has them. 3 bit codes straddle words there, so each 32 of a column
are laid out anew, in the same three words:

    word 0   nibble j:   low bits of code 8 + j · low bits of code j
    word 1   nibble j:   low bits of code 24 + j · low bits of code 16 + j
    word 2   nibble j:   high bits of code 24 + j, 16 + j, 8 + j, j

With act-order the input channels are sorted by group once, and the product gathers x in that order. What
the programs know of groups is one size; where that cannot be, or is no multiple of 32, each channel's group
is looked up and its weights are multiplied as float32: right, and slower.

The product is the custom op `roundwise::triton_linear`: it takes tensors and integers, allocates its output
(and the sums of a split) from torch's allocator, never waits for the device, and always adds in the same
order. So it can be captured in a CUDA graph, compiled around, copied and pickled. Nothing is tuned at run
time: the first product of a shape compiles, which a captured graph must not be the first to do.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch

from roundwise.core.packing import pack, unpack
from roundwise.errors import ConfigError
from roundwise.inference.kernels.base import PackedWeight

#: Bits of 2^23 as float32; see `triton_programs`.
MAGIC = 0x4B000000

#: Up to as many rows of x count as decoding: few enough for one tensor core instruction.
DECODE_ROWS = 16

#: What the interpreter plays: few, so that small tests split as large products do on a GPU.
SIMULATED_PROCESSORS = 8


class TritonKernel:
    """Fused dequantization and product on a GPU, exact but for the order of float32 sums.

    Rows of x do not influence each other: up to DECODE_ROWS rows, a row's result is the same bits whatever
    the others are and however many. Longer inputs are tiled, and summed, otherwise.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, weight: PackedWeight) -> None:
        self.bits, self.zero_offset = weight.bits, weight.zero_offset
        self.qzeros, self.g_idx = weight.qzeros, weight.g_idx
        self.scales = weight.scales.contiguous()
        groups = weight.channel_groups()
        #: int32 [in]: which channel of x comes at each place; None: their own order.
        self.order: torch.Tensor | None = None
        #: int32 [in]: the group of each channel; None: groups of `group_size` channels in a row.
        self.groups: torch.Tensor | None = None
        by_group, order = torch.sort(groups, stable=True)
        self.group_size = int((by_group == by_group[0]).sum())
        places = torch.arange(len(groups), device=groups.device)
        even = torch.equal(by_group, places // self.group_size)
        if not even or (self.group_size % 32 and self.group_size < len(groups)):
            self.group_size, self.groups = 1, groups.to(torch.int32)
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
        """X [rows, in] -> [rows, out]."""
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


def simulated() -> bool:
    """Whether Triton programs run in its interpreter, on any device: for tests and debugging."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _programs() -> Any:
    """The Triton programs, which need triton."""
    from roundwise.inference.kernels import triton_programs

    return triton_programs


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


class Tiling(NamedTuple):
    """How a product is cut: output tiles of BM rows and BN columns, summed over BK channels a step."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    per_processor: int
    """Programs that shall be there for each processor before the channels are no longer split."""

    def splits(self, rows: int, channels: int, outputs: int, processors: int) -> int:
        """Into how many parts the channels are cut so that all processors have work.

        A part is not less than four steps: fewer would only wait for their first loads.
        """
        tiles = -(-rows // self.BM) * -(-outputs // self.BN)
        steps = -(-channels // self.BK)
        return max(1, min(self.per_processor * processors // max(tiles, 1), steps // 4))


def tiling(rows: int, outputs: int, run: int, size: int, processors: int) -> Tiling:
    """The tiling for a product; chosen by compiling for compute capability 9.0 and reading the code.

    Decoding is bound by memory, so instructions are what must not get in the way: 4.3 for each 4 bit code
    with 128 columns a tile and 5.1 with 64, which gives narrow layers twice the tiles. Two programs for
    each processor hide each other's latency. From 17 rows on, tiles grow with the rows: a weight is
    dequantized once for all BM of them, and sums have to fit the registers, 128 · 128 in eight warps.

    Args:
        rows: of x.
        outputs: output channels.
        run: input channels in a row that share a group, 0 if each is looked up.
        size: bytes of an element of x.
        processors: multiprocessors of the device.
    """
    BK = min(128, run & -run)
    if not run:  # float32 weights, in three parts
        return Tiling(16 if rows <= DECODE_ROWS else 64, 64, 32, 4, 2, 2)
    if rows <= DECODE_ROWS:
        wide = 2 * -(-outputs // 128) >= processors
        return Tiling(16, 128 if wide else 64, BK, 4, 4 if size == 2 else 3, 2)
    if rows <= 32:
        return Tiling(32, 64, BK, 4, 4 if size == 2 else 3, 2)
    if rows <= 64 or size == 4:
        return Tiling(64, 128, min(BK, 256 // size), 8, 3 if size == 2 else 2, 1)
    return Tiling(128, 128, BK, 8, 3, 1)


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
    """X [rows, in] times the weight: [rows, out]."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return _linear(x, words, scales, zeros, order, groups, bits, zero, group_size)
    if not x.is_cuda and not simulated():
        raise ConfigError(
            f"triton_linear runs on CUDA devices, not on {x.device.type}; "
            "TRITON_INTERPRET=1 simulates one"
        )
    rows, channels = x.shape
    outputs = scales.shape[1]
    # Triton's interpreter rounds to bfloat16 by cutting off: torch rounds for it.
    y = x.new_empty(rows, outputs, dtype=torch.float32 if simulated() else x.dtype)
    if not rows:
        return y.to(x.dtype)
    if order is not None:
        x = x.index_select(1, order)
    elif x.stride(1) != 1:
        x = x.contiguous()
    processors = _processors(x.device.index) if x.is_cuda else SIMULATED_PROCESSORS
    run = 0 if groups is not None else 128 if group_size >= channels else group_size
    cut = tiling(rows, outputs, run, x.element_size(), processors)
    splits = cut.splits(rows, channels, outputs, processors)
    steps = -(-channels // cut.BK)
    parts = y
    if splits > 1:
        parts = x.new_empty(splits, rows, outputs, dtype=torch.float32)
    programs = _programs()
    programs.tiles[-(-rows // cut.BM), -(-outputs // cut.BN), splits](
        x, words, scales, zeros if zeros is not None else words, groups if groups is not None else words,
        parts, rows, outputs, channels, x.stride(0),
        steps if group_size >= channels else max(1, group_size // cut.BK), -(-steps // splits), MAGIC,
        BITS=bits, ZERO=zero, SCATTERED=groups is not None,
        BM=cut.BM, BN=cut.BN, BK=cut.BK, STAGES=cut.stages, num_warps=cut.warps,
    )  # fmt: skip
    if splits > 1:
        size = rows * outputs
        programs.total[(-(-size // 1024),)](parts, y, size, SPLITS=splits, BLOCK=1024, num_warps=4)
    return y.to(x.dtype)


def _shape(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, *_: Any) -> torch.Tensor:
    """What `_linear` returns, without its values: for torch.compile."""
    return x.new_empty(x.shape[0], scales.shape[1])


# The low level of torch.library: `torch.library.custom_op` adds microseconds to every call.
_LIBRARY = torch.library.Library("roundwise", "FRAGMENT")
_LIBRARY.define(
    "triton_linear(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? order, Tensor? groups, "
    "int bits, int zero, int group_size) -> Tensor"
)
_LIBRARY.impl("triton_linear", _linear, "CUDA")
_LIBRARY.impl("triton_linear", _linear, "CPU")  # Triton's interpreter
torch.library.register_fake("roundwise::triton_linear", _shape, lib=_LIBRARY)
