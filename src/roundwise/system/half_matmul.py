"""Half-precision (bf16, fp16) matmuls on the CPU, faster than torch's or with bounded memory.

A CPU without instructions for them (x86 before AVX-512: most laptops) multiplies element by element, at
a tenth of float32's speed. There the operands are converted to float32 for the product. Nothing is
lost: the instructions do the same, they sum in float32 and round once at the end.

On a CPU with such instructions, oneDNN compiles and caches a kernel for each shape: a megabyte for each
number of tokens that an expert has ever seen, gigabytes for a mixture of experts. There the inputs of
experts are padded to a few sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode

HALF = (torch.bfloat16, torch.float16)
#: Fewest rows of an input for which converting the weight to float32 pays off.
MIN_ROWS = 8
#: Rows of a linear layer's input that are converted at a time.
ROWS_AT_A_TIME = 1024


def cpu_half_matmul() -> CpuHalfMatmul:
    """Context manager: runs bf16/fp16 matmuls in float32 on CPUs without native support for them.

    For a type with native support, the inputs of experts are padded to a few sizes instead. Affects the
    calling thread only.
    """
    return CpuHalfMatmul(frozenset(dtype for dtype in HALF if not has_native_matmul(dtype)))


def needs_half_matmul(dtypes: Iterable[torch.dtype], device: torch.device, *, ragged: bool) -> bool:
    """Returns True if `cpu_half_matmul` changes anything in a model's forward.

    Args:
        dtypes: dtypes of the model's weights.
        device: device that runs the model.
        ragged: the model has layers whose number of tokens varies, as that of experts does.
    """
    half = {*dtypes}.intersection(HALF) if device.type == "cpu" else set()
    return any(ragged or not has_native_matmul(dtype) for dtype in half)


class outside_model:  # noqa: N801  # a context manager that reads like a function
    """Context manager: switches `cpu_half_matmul` off for code that runs inside a model's forward.

    Hooks that sum up activations need no change of their matmuls, and each of their torch calls would
    pass through Python twice. A no-op where `cpu_half_matmul` is not on.
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
    """Returns True if oneDNN, and so torch, has fast products of `dtype` on this CPU.

    Args:
        dtype: bfloat16 or float16.
    """
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
    except (AttributeError, RuntimeError):  # built without oneDNN
        return False


class CpuHalfMatmul(TorchFunctionMode):
    """Torch function mode that replaces half-precision matmuls on the CPU.

    Args:
        in_float32: the half-precision types whose products are computed in float32. With the other
            half-precision types, the inputs of experts are padded.
    """

    def __init__(self, in_float32: frozenset[torch.dtype]) -> None:
        super().__init__()
        self.in_float32 = in_float32

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls `func`, or its replacement."""
        kwargs = kwargs or {}
        replacement = REPLACEMENTS.get(func)
        if replacement is None or "out" in kwargs:
            return func(*args, **kwargs)
        # The first matrix; a bias may stand before it.
        x = next((a for a in args if isinstance(a, torch.Tensor) and a.ndim > 1), None)
        if x is None or x.dtype not in HALF or x.device.type != "cpu":
            return func(*args, **kwargs)
        if x.dtype not in self.in_float32:
            # Only experts take tokens without a batch dimension; their number differs every time.
            varies = func is functional.linear and x.ndim == 2
            return (_padded_linear if varies else func)(*args, **kwargs)
        if x.numel() < MIN_ROWS * x.shape[-1]:
            return func(*args, **kwargs)
        return replacement(func, self.in_float32, *args, **kwargs)


def padded_rows(rows: int) -> int:
    """Returns the next larger of a few sizes: eight between a power of two and the next."""
    step = max(MIN_ROWS, 1 << max(0, (rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def _padded_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A linear layer whose input is padded with zero rows; rows do not depend on one another."""
    padding = padded_rows(len(x)) - len(x)
    if not padding:
        return functional.linear(x, weight, bias)
    return functional.linear(functional.pad(x, (0, 0, 0, padding)), weight, bias)[: len(x)]


def _float32_linear(
    func: Any, in_float32: frozenset[torch.dtype], x: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """A linear layer in float32; converts its input, which may be far larger than W, in parts."""
    W, b = weight.float(), None if bias is None else bias.float()
    rows = x.reshape(-1, x.shape[-1])
    parts = [func(part.float(), W, b).to(x.dtype) for part in torch.split(rows, ROWS_AT_A_TIME)]
    return torch.cat(parts).view(*x.shape[:-1], len(W))


def _float32_product(
    func: Any, in_float32: frozenset[torch.dtype], *args: Any, **kwargs: Any
) -> Any:
    """Any other product, with all operands converted to float32."""
    dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor))

    def convert(a: Any) -> Any:
        return a.float() if isinstance(a, torch.Tensor) and a.dtype in in_float32 else a

    result = func(*map(convert, args), **{name: convert(a) for name, a in kwargs.items()})
    return result.to(dtype)


#: Torch function -> its replacement in float32.
REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    functional.linear: _float32_linear,
    **dict.fromkeys(
        (
            functional.scaled_dot_product_attention, functional.conv1d, functional.conv2d,
            torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm,
            torch.bmm, torch.Tensor.bmm, torch.addmm, torch.Tensor.addmm, torch.baddbmm,
            torch.Tensor.baddbmm,
        ),
        _float32_product,
    ),
}  # fmt: skip
