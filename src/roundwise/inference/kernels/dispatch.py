"""Which kernel computes a layer: the one place that decides."""

from __future__ import annotations

import os

from roundwise.errors import ConfigError
from roundwise.inference.kernels.base import Kernel, PackedWeight
from roundwise.inference.kernels.cpp import NativeKernel
from roundwise.inference.kernels.reference import ReferenceKernel
from roundwise.inference.kernels.triton import TritonKernel, simulated

#: The best first.
KERNELS: tuple[type[Kernel], ...] = (TritonKernel, NativeKernel, ReferenceKernel)


def choose(weight: PackedWeight, name: str | None = None) -> type[Kernel]:
    """The best kernel for this weight where it lies, by device, width, groups and shape.

    Args:
        weight: of the layer.
        name: this one and no other; None: what the environment variable ROUNDWISE_KERNEL names, or
            else the best.

    Raises:
        ConfigError: the named kernel is not known, or cannot compute with this weight.
    """
    name = name or os.environ.get("ROUNDWISE_KERNEL") or None
    if name is None:
        # Triton's interpreter is for tests: by name only.
        kernels = [kernel for kernel in KERNELS if kernel is not TritonKernel or not simulated()]
        return next(kernel for kernel in kernels if kernel.why_not(weight) is None)
    known = {kernel.name: kernel for kernel in KERNELS}
    if name not in known:
        raise ConfigError(f"no kernel is called {name!r}: there are {', '.join(known)}")
    reason = known[name].why_not(weight)
    if reason is not None:
        raise ConfigError(f"the kernel {name} cannot compute this layer: {reason}")
    return known[name]
