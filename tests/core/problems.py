"""Random layers that tests solve."""

from __future__ import annotations

import torch


def layer(seed: int, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs with uneven channel norms, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    X = torch.randn(4 * width, width, generator=generator, dtype=torch.float64) @ mix
    X *= torch.rand(width, generator=generator, dtype=torch.float64) + 0.1
    W = 0.05 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return W, X.T @ X / len(X)
