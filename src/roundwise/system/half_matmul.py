"""Half precision on the CPU: products that torch computes slowly there, or never forgets.

Where a CPU has no instructions for such products (x86 before AVX-512: most laptops), torch multiplies
element by element, at a tenth of float32's speed. Widening the operands for the product loses nothing:
it is what the instructions do, sums in float32 and one rounding at the end.

Where it has them, oneDNN compiles a program for each shape and keeps it: a megabyte for each number of
tokens that an expert has ever seen, gigabytes for a mixture. Such inputs are filled up to few sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode

HALF = (torch.bfloat16, torch.float16)
#: Rows from which on widening a weight costs less than it gains.
FEW = 8
#: Rows of a linear layer's input that are widened at a time.
ROWS = 1024


def cpu_half_matmul() -> CpuHalfMatmul:
    """While it is entered, half precision on the CPU is multiplied as this processor does it best.

    Large products are computed in float32 where it does not multiply the type itself; where it does,
    the tokens of an expert are filled up to one of few numbers. The calling thread's alone.
    """
    return CpuHalfMatmul(frozenset(dtype for dtype in HALF if not has_native_matmul(dtype)))


class outside_model:  # noqa: N801  # a context manager that reads like a function
    """Context manager: switches `cpu_half_matmul` off for code that runs inside a model's forward.

    Hooks that sum up activations are not the model's: they need none of its matmuls changed, and each of
    their torch calls would pass through Python twice. A no-op where `cpu_half_matmul` is not on.
    """

    def __enter__(self) -> None:
        mode = _get_current_function_mode()  # type: ignore[no-untyped-call]
        self._mode = mode if isinstance(mode, CpuHalfMatmul) else None
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        if self._mode is not None:
            self._mode.__enter__()  # type: ignore[no-untyped-call]


@cache
def has_native_matmul(dtype: torch.dtype) -> bool:
    """Torch has fast products of this type on this CPU: those of oneDNN."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
    except (AttributeError, RuntimeError):  # built without oneDNN
        return False


class CpuHalfMatmul(TorchFunctionMode):
    """Products of the `narrow` types in float32; those of the other half-precision type, filled up."""

    def __init__(self, narrow: frozenset[torch.dtype]) -> None:
        super().__init__()
        self.narrow = narrow

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """`func`, or what stands for it."""
        kwargs = kwargs or {}
        product = PRODUCTS.get(func)
        if product is None or "out" in kwargs:
            return func(*args, **kwargs)
        # The first matrix; a bias may stand before it.
        x = next((a for a in args if isinstance(a, torch.Tensor) and a.ndim > 1), None)
        if x is None or x.dtype not in HALF or x.device.type != "cpu":
            return func(*args, **kwargs)
        if x.dtype not in self.narrow:
            # Only experts take tokens without an axis for texts; their number differs every time.
            varies = func is functional.linear and x.ndim == 2
            return (_padded_linear if varies else func)(*args, **kwargs)
        if x.numel() < FEW * x.shape[-1]:
            return func(*args, **kwargs)
        return product(func, self.narrow, *args, **kwargs)


def padded_rows(rows: int) -> int:
    """The least of few numbers that is not below `rows`: eight between a power of two and the next."""
    step = max(FEW, 1 << max(0, (rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def _padded_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A linear layer whose input is filled up with zeros; a row's result does not depend on others."""
    more = padded_rows(len(x)) - len(x)
    if not more:
        return functional.linear(x, weight, bias)
    return functional.linear(functional.pad(x, (0, 0, 0, more)), weight, bias)[: len(x)]


def _linear(
    func: Any, narrow: frozenset[torch.dtype], x: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """A linear layer; its input is widened in parts, which may be much larger than its weight."""
    W, b = weight.float(), None if bias is None else bias.float()
    rows = x.reshape(-1, x.shape[-1])
    parts = [func(part.float(), W, b).to(x.dtype) for part in torch.split(rows, ROWS)]
    return torch.cat(parts).view(*x.shape[:-1], len(W))


def _widened(func: Any, narrow: frozenset[torch.dtype], *args: Any, **kwargs: Any) -> Any:
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
        _widened,
    ),
}  # fmt: skip
