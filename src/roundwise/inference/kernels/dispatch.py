"""Chooses the kernel that computes a layer."""

from __future__ import annotations

import os

from roundwise.errors import ConfigError
from roundwise.inference.kernels.base import Kernel, PackedWeight
from roundwise.inference.kernels.cpp import NativeKernel
from roundwise.inference.kernels.reference import ReferenceKernel
from roundwise.inference.kernels.triton import TritonKernel
from roundwise.inference.kernels.triton_launch import is_interpreted

#: All kernels, the fastest first.
KERNELS: tuple[type[Kernel], ...] = (TritonKernel, NativeKernel, ReferenceKernel)


def choose_kernel(weight: PackedWeight, name: str | None = None) -> type[Kernel]:
    """Returns the fastest kernel that supports a weight on its device.

    Args:
        weight: packed weight of the layer.
        name: name of the kernel to use; None: the one in the environment variable ROUNDWISE_KERNEL, or
            else the fastest.

    Raises:
        ConfigError: the named kernel does not exist or does not support this weight.
    """
    name = name or os.environ.get("ROUNDWISE_KERNEL") or None
    if name is None:
        # Triton's interpreter is for tests: it is used by name only.
        candidates = [
            kernel for kernel in KERNELS if kernel is not TritonKernel or not is_interpreted()
        ]
        return next(kernel for kernel in candidates if kernel.unsupported_reason(weight) is None)
    by_name = {kernel.name: kernel for kernel in KERNELS}
    if name not in by_name:
        raise ConfigError(f"there is no kernel {name!r}: use {', '.join(by_name)}")
    reason = by_name[name].unsupported_reason(weight)
    if reason is not None:
        raise ConfigError(f"the kernel {name} cannot compute this layer: {reason}")
    return by_name[name]
