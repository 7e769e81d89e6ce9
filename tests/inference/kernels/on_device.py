"""Random weights and inputs on the CUDA device if there is one, for tests of the Triton kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from roundwise.inference.kernels.base import PackedWeight
from tests.inference.kernels.packed import random_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def weight(
    channels: int, outputs: int, bits: int, group_size: int, *, sym: bool = False, **options: Any
) -> PackedWeight:
    """A random weight on the device."""
    return random_weight(
        bits, channels, outputs, group_size, sym=sym, **{"device": DEVICE, **options}
    )


def rows(count: int, channels: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, generator=generator).to(dtype).to(DEVICE)
