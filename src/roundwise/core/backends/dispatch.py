"""Choice of the solver backend for one weight: the one place that decides."""

from __future__ import annotations

import torch

from roundwise.core.backends import cpp, triton
from roundwise.core.backends.base import SolverBackend
from roundwise.core.backends.cpp import CppBackend
from roundwise.core.backends.reference import TorchBackend
from roundwise.core.backends.triton import TritonBackend


def choose_backend(tensor: torch.Tensor) -> SolverBackend:
    """Returns the fastest backend for the device and dtype of this tensor.

    C++ on the CPU, where the extension is built and not switched off; Triton on CUDA devices in
    float32, where it is installed; else plain torch.
    """
    if tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64):
        extension, _ = cpp.load()
        if extension is not None:
            return CppBackend(extension)
    if tensor.device.type == "cuda" and tensor.dtype == torch.float32 and triton.available():
        return TritonBackend()
    return TorchBackend()
