"""The CPU kernel: products with packed codes in C++, at the speed of memory (src/native/linear.cpp)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from roundwise.core import native
from roundwise.core.packing import pack
from roundwise.inference.kernels import layout
from roundwise.inference.kernels.base import PackedWeight

#: As src/native/kernels.hpp numbers them.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class NativeKernel:
    """Every width, group size and order; x in float32, float16 or bfloat16.

    Activations are rounded to 16-bit integers, with a scale for each run of at most 128 columns of a
    group, and multiplied exactly: the result is within about 1e-4 of float64's, relative, and that of a
    row does not depend on the other rows nor on the number of threads.
    """

    name: ClassVar[str] = "native"

    def __init__(self, weight: PackedWeight) -> None:
        self.bits, self.zero_offset = weight.bits, weight.zero_offset
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.g_idx, self.scales_dtype = weight.g_idx, weight.scales.dtype
        self.columns = layout.columns_of(weight)
        self.order = layout.reading_order(self.columns, weight.bits)
        self.codes = layout.to_tiles(weight, self.columns)
        scales = weight.scales
        # bfloat16 reaches further than float16: float32 holds it exactly.
        scales = scales if scales.dtype == torch.float16 else scales.to(torch.float32)
        self.scales = layout.tiled(scales)
        zeros = weight.zeros()
        self.zero = int(zeros[0, 0])
        varied = bool((zeros != self.zero).any())
        self.zeros = layout.tiled(zeros.to(torch.uint8)) if varied else None
        self._product: Any = None

    @classmethod
    def why_not(cls, weight: PackedWeight) -> str | None:
        """Elsewhere than on the CPU, and without the extension."""
        if weight.qweight.device.type != "cpu":
            return f"it computes on the CPU, not on {weight.qweight.device.type}"
        module, status = native.load()
        return f"the native extension is {status.reason}" if module is None else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in] -> [..., out]."""
        if torch.compiler.is_compiling():
            y: torch.Tensor = torch.ops.roundwise.native_linear(
                x, *self._tensors(), *self._numbers()
            )
            return y
        if self._product is None:
            self._product = _checked(self._tensors(), self._numbers())
        return _multiply(self._product, x, self.out_features)

    def _tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.codes, self.scales, self.zeros, self.order, self.columns.runs

    def _numbers(self) -> tuple[int, ...]:
        return self.bits, self.zero, self.in_features, self.out_features

    def __getstate__(self) -> dict[str, Any]:
        # Copies have tensors at other addresses.
        return {**self.__dict__, "_product": None}

    def packed(self) -> PackedWeight:
        """The weight it was made from."""
        groups = self.scales.shape[1]
        if self.zeros is None:
            zeros = torch.full((groups, self.out_features), self.zero, dtype=torch.int32)
        else:
            zeros = layout.flat(self.zeros, self.out_features).to(torch.int32)
        stored = (zeros - self.zero_offset) & (2**self.bits - 1)
        return PackedWeight(
            layout.from_tiles(self.codes, self.out_features, self.columns, self.bits),
            pack(stored.T, self.bits).T.contiguous(),
            layout.flat(self.scales, self.out_features).to(self.scales_dtype),
            self.g_idx, self.bits, self.zero_offset,
        )  # fmt: skip


def _checked(tensors: tuple[Any, ...], numbers: tuple[int, ...]) -> Any:
    """The layer as the extension knows it: addresses, so the tensors must outlive it."""
    codes, scales, zeros, order, runs = tensors
    bits, zero, in_features, out_features = numbers
    module = native.load()[0]
    assert module is not None  # `why_not` said so
    return module.PackedLinear(
        in_features, out_features, bits, codes.view(-1), scales.view(torch.uint8).view(-1),
        scales.dtype == torch.float16,
        torch.empty(0, dtype=torch.uint8) if zeros is None else zeros.view(-1),
        zero, order, runs.view(-1), scales.shape[1],
    )  # fmt: skip


def _multiply(product: Any, x: torch.Tensor, out_features: int) -> torch.Tensor:
    x, shape = x.contiguous(), x.shape
    y = x.new_empty((*shape[:-1], out_features))
    product.multiply(
        x.data_ptr(), y.data_ptr(), math.prod(shape[:-1]), shape[-1], TYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _native_linear(x: torch.Tensor, *weight: Any) -> torch.Tensor:
    return _multiply(_checked(weight[:5], weight[5:]), x, weight[-1])


# For torch.compile, which cannot look into the extension: the same product as one operator.
LIBRARY = torch.library.Library("roundwise", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define(  # type: ignore[no-untyped-call]
    "native_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor order, Tensor runs, "
    "int bits, int zero, int in_features, int out_features) -> Tensor"
)
LIBRARY.impl("native_linear", _native_linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "roundwise::native_linear",
    lambda x, *weight: x.new_empty((*x.shape[:-1], weight[-1])),
    lib=LIBRARY,
)
