"""QuantizedWeight: what a linear layer's weight becomes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Rows dequantized at a time: the float32 temporaries stay small.
ROWS = 512


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes, scales and zero points of one weight [out, in], and how well they stand for it."""

    codes: torch.Tensor
    """uint8 [out, in], original channel order."""
    scales: torch.Tensor
    """float16 [out, groups], finite and not zero; negative ones turn a range around."""
    zeros: torch.Tensor
    """int32 [out, groups], 0 … 2^bits - 1."""
    g_idx: torch.Tensor
    """int32 [in]: the group of each input channel."""
    bits: int
    relative_error: float | None = None
    """||(W - Q)X||² / ||WX||² on the calibration inputs; None when no Hessian was given."""
    weight_error: float = 0.0
    """||W - Q||² / ||W||²: what can be checked later without calibration inputs."""
    energy: float = 0.0
    """||WX||² that `relative_error` is relative to, per token."""
    weight_energy: float = 0.0
    """||W||² that `weight_error` is relative to."""
    damp_percent: float | None = None
    """Damping that was used in the end."""
    damp_tried: tuple[float, ...] = ()
    """Every damping tried, in order; more than one means that H was indefinite at the first."""
    fallback: str | None = None
    """Why this weight was rounded to nearest instead of solved; None when it was solved."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Q [out, in] = scales · (codes - zeros), computed in float32, returned as `dtype`."""
        groups = self.g_idx.long()
        Q = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        for start in range(0, len(Q), ROWS):
            rows = slice(start, start + ROWS)
            part = self.codes[rows].to(torch.float32)
            part -= self.zeros[rows].to(torch.float32)[:, groups]
            part *= self.scales[rows].to(torch.float32)[:, groups]
            Q[rows] = part
        return Q
