"""Launch of the GPU kernel: the custom operator `roundwise::triton_linear`, and how it cuts a product.

The operator takes tensors and integers, allocates memory only through torch (the output, and partial
sums if it splits the input channels), never waits for the device, and always adds in the same order. So
it can be captured in a CUDA graph and compiled around, and kernels can be copied and pickled. Nothing
is tuned at run time. The first product of each kind compiles its program: capture a graph only after a
product of the same shape.
"""

from __future__ import annotations

import os
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from roundwise.errors import ConfigError

#: The bits of 2^23 as float32; see `triton_kernels`.
MAGIC = 0x4B000000
#: Most rows of x that count as decoding: few enough for one tensor core instruction.
DECODE_ROWS = 16


def is_interpreted() -> bool:
    """Tells whether Triton programs run in its interpreter, on any device: for tests and debugging."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


@cache
def _programs() -> Any:
    """Imports the Triton programs, which need the package triton."""
    from roundwise.inference.kernels import triton_kernels

    return triton_kernels


class DeviceLimits(NamedTuple):
    """Properties of a GPU that a tiling depends on."""

    processors: int
    """Number of streaming multiprocessors."""
    shared_memory: int
    """Most bytes of shared memory per program."""


@cache
def _device_limits(index: int | None) -> DeviceLimits:
    """Returns the limits of a CUDA device; for None, limits for the interpreter.

    The interpreter has few multiprocessors, so that tests of small products cover splits too.
    """
    if index is None:
        return DeviceLimits(8, 232448)
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 65536)  # AMD does not report it
    return DeviceLimits(properties.multi_processor_count, shared)


class Tiling(NamedTuple):
    """Tile sizes of a product: BM rows of x and BN output channels, BK input channels per step."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    """Steps whose loads are in flight at the same time."""
    programs_per_processor: int
    """Input channels are split until there are as many programs per multiprocessor."""

    def shared_memory(self, bits: int, x_bytes: int) -> int:
        """Returns an upper bound of the shared memory of a program, in bytes.

        Every stage has its x and words; dequantized weights are there once.

        Args:
            bits: width of a code.
            x_bytes: bytes of an entry of x.
        """
        words = self.BN * self.BK * bits // 8
        grids = self.BN * 8  # scales and zero points
        per_stage = self.BM * self.BK * x_bytes + words + grids
        return self.stages * per_stage + self.BN * self.BK * 2

    def splits(self, rows: int, channels: int, outputs: int, device: DeviceLimits) -> int:
        """Returns the number of parts of the input channels, so that all multiprocessors have work.

        A part has at least four steps: a shorter one would mostly wait for its first words.

        Args:
            rows: rows of x.
            channels: input channels.
            outputs: output channels.
            device: GPU that computes.
        """
        tiles = -(-rows // self.BM) * -(-outputs // self.BN)
        steps = -(-channels // self.BK)
        return max(1, min(self.programs_per_processor * device.processors // tiles, steps // 4))


def choose_tiling(
    rows: int, outputs: int, run: int, bits: int, x_bytes: int, device: DeviceLimits
) -> Tiling:
    """Returns the tiling of a product; chosen from the machine code for compute capability 9.0.

    Decoding (up to DECODE_ROWS rows) waits for memory as long as instructions do not slow it down:
    there are 4.3 instructions per 4-bit code with tiles of 128 output channels, and 5.1 with tiles of
    64, which give narrow layers twice as many tiles. Two programs per multiprocessor load while the
    other computes. For longer inputs, BM grows with the number of rows: a weight is dequantized once
    for all BM rows. Sums of 128 · 128, in eight warps, are the most that fit into the registers.

    Args:
        rows: rows of x.
        outputs: output channels.
        run: consecutive input channels that share a group; 0 if the group of each is looked up.
        bits: width of a code.
        x_bytes: bytes of an entry of x.
        device: GPU that computes.
    """
    BK = min(128, run & -run)
    if not run:  # weights are float32, multiplied in three parts
        return Tiling(16 if rows <= DECODE_ROWS else 64, 64, 32, 4, 2, 2)
    if rows <= DECODE_ROWS:
        wide = 2 * -(-outputs // 128) >= device.processors
        tiling = Tiling(16, 128 if wide else 64, BK, 4, 4 if x_bytes == 2 else 3, 2)
    elif rows <= 32:
        tiling = Tiling(32, 64, BK, 4, 4 if x_bytes == 2 else 3, 2)
    elif x_bytes == 4:
        tiling = Tiling(64, 128, min(BK, 64), 8, 2, 1)
    else:
        tiling = Tiling(64 if rows <= 64 else 128, 128, BK, 8, 3, 1)
    while tiling.shared_memory(bits, x_bytes) > device.shared_memory and tiling.BK > 32:
        tiling = tiling._replace(BK=tiling.BK // 2)
    return tiling


class Launch(NamedTuple):
    """Launch parameters of a product."""

    tiling: Tiling
    splits: int
    """Number of parts of the input channels; their sums are added at the end."""
    tiles_per_split: int
    tiles_per_group: int


@lru_cache(4096)
def plan_launch(
    rows: int,
    channels: int,
    outputs: int,
    group_size: int,
    bits: int,
    x_bytes: int,
    device: DeviceLimits,
) -> Launch:
    """Returns the launch parameters of a product.

    Args:
        rows: rows of x.
        channels: input channels.
        outputs: output channels.
        group_size: input channels of a group; 0 if the group of each channel is looked up.
        bits: width of a code.
        x_bytes: bytes of an entry of x.
        device: GPU that computes.
    """
    one_group = group_size >= channels
    tiling = choose_tiling(rows, outputs, 128 if one_group else group_size, bits, x_bytes, device)
    steps = -(-channels // tiling.BK)
    tiles_per_split = -(-steps // tiling.splits(rows, channels, outputs, device))
    tiles_per_group = steps if one_group else max(1, group_size // tiling.BK)
    return Launch(tiling, -(-steps // tiles_per_split), tiles_per_split, tiles_per_group)


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
    """Implements `roundwise::triton_linear`: multiplies x [..., in] with a weight; returns [..., out].

    Args:
        x: float32, float16 or bfloat16.
        words, scales, zeros, order, groups, bits, zero, group_size: see `TritonKernel`.

    Raises:
        ConfigError: x is not on a CUDA device, and Triton's interpreter is not enabled.
        ValueError: x has another number of channels than the weight.
    """
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return _linear(x, words, scales, zeros, order, groups, bits, zero, group_size)
    if not x.is_cuda and not is_interpreted():
        raise ConfigError(
            f"triton_linear runs on CUDA devices, not on {x.device.type}: set TRITON_INTERPRET=1 to use "
            "Triton's interpreter"
        )
    *shape, channels = x.shape
    outputs = scales.shape[1]
    if channels != words.shape[0] * 32 // bits:
        raise ValueError(
            f"x has {channels} channels, but the weight has {words.shape[0] * 32 // bits}"
        )
    x = x.reshape(-1, channels)
    rows = len(x)
    # Triton's interpreter truncates to bfloat16, so torch does the rounding there.
    y = x.new_empty(*shape, outputs, dtype=torch.float32 if is_interpreted() else x.dtype)
    if not rows:
        return y.to(x.dtype)
    if order is not None:
        x = x.index_select(1, order)
    elif x.stride(1) != 1:
        x = x.contiguous()
    device = _device_limits(x.device.index if x.is_cuda else None)
    tiling, splits, tiles_per_split, tiles_per_group = plan_launch(
        rows, channels, outputs, group_size, bits, x.element_size(), device
    )
    partial = y
    if splits > 1:
        partial = x.new_empty(splits, rows, outputs, dtype=torch.float32)
    programs = _programs()
    programs.matmul_tiles[-(-rows // tiling.BM), -(-outputs // tiling.BN), splits](
        x, words, scales, words if zeros is None else zeros, words if groups is None else groups,
        partial, rows, outputs, channels, x.stride(0), tiles_per_group, tiles_per_split, MAGIC,
        BITS=bits, ZERO=zero, SCATTERED=groups is not None,
        BM=tiling.BM, BN=tiling.BN, BK=tiling.BK, STAGES=tiling.stages, num_warps=tiling.warps,
    )  # fmt: skip
    if splits > 1:
        size = rows * outputs
        programs.sum_splits[(-(-size // 1024),)](
            partial, y, size, SPLITS=splits, BLOCK=1024, num_warps=4
        )
    return y.to(x.dtype)


def _fake_linear(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, *_: Any
) -> torch.Tensor:
    """Returns a tensor with the shape and dtype of `_linear`'s result, for torch.compile."""
    return x.new_empty(*x.shape[:-1], scales.shape[1])


# torch.library's low-level interface: `torch.library.custom_op` adds microseconds to every call.
_LIBRARY: Any = torch.library.Library("roundwise", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "triton_linear(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? order, "
    "Tensor? groups, int bits, int zero, int group_size) -> Tensor"
)
_LIBRARY.impl("triton_linear", _linear, "CUDA")
_LIBRARY.impl("triton_linear", _linear, "CPU")  # Triton's interpreter
torch.library.register_fake("roundwise::triton_linear", _fake_linear, lib=_LIBRARY)
