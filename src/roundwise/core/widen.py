"""Half precision on processors that cannot multiply it: products in float32, results in their own type.

Where a CPU has no instructions for such products (x86 before AVX-512: most laptops), torch multiplies
element by element, at a tenth of float32's speed. Widening the operands for the product loses nothing:
it is what the instructions do, sums in float32 and one rounding at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

#: Rows from which on widening a weight costs less than it gains.
FEW = 8
#: Rows of a linear layer's input that are widened at a time.
ROWS = 1024


def widening() -> AbstractContextManager[Any]:
    """While it is entered, large products of half precision on the CPU are computed in float32.

    Does nothing where the processor multiplies both types itself. The calling thread's alone.
    """
    narrow = frozenset(dtype for dtype in (torch.bfloat16, torch.float16) if not multiplies(dtype))
    return Widening(narrow) if narrow else nullcontext()


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Torch has fast products of this type on this CPU: those of oneDNN."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
    except (AttributeError, RuntimeError):  # built without oneDNN
        return False


class Widening(TorchFunctionMode):
    """Products of the `narrow` types in float32."""

    def __init__(self, narrow: frozenset[torch.dtype]) -> None:
        super().__init__()
        self.narrow = narrow

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """`func`, or what stands for it."""
        kwargs = kwargs or {}
        product = PRODUCTS.get(func)
        if product is None or not self._concerns(args) or "out" in kwargs:
            return func(*args, **kwargs)
        return product(func, self.narrow, *args, **kwargs)

    def _concerns(self, args: tuple[Any, ...]) -> bool:
        """The first matrix (a bias may stand before it) is a large one of a narrow type, on the CPU."""
        x = next((a for a in args if isinstance(a, torch.Tensor) and a.ndim > 1), None)
        if x is None or x.dtype not in self.narrow or x.device.type != "cpu":
            return False
        return x.numel() >= FEW * x.shape[-1]


def _linear(
    func: Any, narrow: frozenset[torch.dtype], x: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """A linear layer; its input is widened in parts, which may be much larger than its weight."""
    W, b = weight.float(), None if bias is None else bias.float()
    rows = x.reshape(-1, x.shape[-1])
    parts = [func(part.float(), W, b).to(x.dtype) for part in torch.split(rows, ROWS)]
    return torch.cat(parts).view(*x.shape[:-1], len(W))


def _any(func: Any, narrow: frozenset[torch.dtype], *args: Any, **kwargs: Any) -> Any:
    """Any other product: all operands widened."""
    dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor))

    def wide(a: Any) -> Any:
        return a.float() if isinstance(a, torch.Tensor) and a.dtype in narrow else a

    result = func(*map(wide, args), **{name: wide(a) for name, a in kwargs.items()})
    return result.to(dtype)


PRODUCTS: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    **dict.fromkeys(
        (
            functional.scaled_dot_product_attention, functional.conv1d, functional.conv2d,
            torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm,
            torch.bmm, torch.Tensor.bmm, torch.addmm, torch.Tensor.addmm, torch.baddbmm,
            torch.Tensor.baddbmm,
        ),
        _any,
    ),
}  # fmt: skip
