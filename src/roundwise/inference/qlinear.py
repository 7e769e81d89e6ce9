"""QuantLinear: a linear layer that computes from packed weights.

This is the reference: it unpacks, dequantizes and multiplies, correct for every width, group size,
zero point and channel order, and as slow as that sounds. Its buffers carry the names and shapes of
the file format, so a state dict is a checkpoint.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from roundwise.core.packing import codes_per_block, unpack


class QuantLinear(nn.Module):
    """y = x Qᵀ + bias with Q = scales · (codes - zeros), all [out, in] unpacked on the fly.

    Args:
        in_features, out_features: of the layer.
        bits: 2, 3, 4 or 8.
        groups: number of groups along the input channels.
        bias: whether there is one.
        stored_g_idx: whether the file says which group a channel belongs to (None: channel order).
        zero_offset: 1 if the file stores zero points minus one (v1), else 0.
        dtype: of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        groups: int,
        bias: bool,
        stored_g_idx: bool = True,
        zero_offset: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        codes_per_block(bits)  # refuses other widths
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        self.bits, self.groups, self.zero_offset = bits, groups, zero_offset
        words = in_features * bits // 32
        self.qweight: torch.Tensor
        self.register_buffer("qweight", torch.zeros(words, out_features, dtype=torch.int32))
        self.qzeros: torch.Tensor
        self.register_buffer(
            "qzeros", torch.zeros(groups, out_features * bits // 32, dtype=torch.int32)
        )
        self.scales: torch.Tensor
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        self.g_idx: torch.Tensor | None
        g_idx = torch.zeros(in_features, dtype=torch.int32) if stored_g_idx else None
        self.register_buffer("g_idx", g_idx)
        self.bias: torch.Tensor | None
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)

    @property
    def weight(self) -> torch.Tensor:
        """Empty: for model code that asks a linear's weight for its dtype or device.

        Some models initialise `layer.weight` by name when they are loaded; the mark makes
        transformers pass over it.
        """
        stand_in = torch.empty(0, dtype=self.dtype, device=self.qweight.device)
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
        return stand_in

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Q as [in, out]: the transpose of a linear's weight, which is how it is stored."""
        maxq = 2**self.bits - 1
        zeros = unpack(self.qzeros.T.contiguous(), self.bits).T.to(torch.int32)
        zeros = ((zeros + self.zero_offset) & maxq).to(torch.float32)
        codes = unpack(self.qweight, self.bits).to(torch.float32)
        scales = self.scales.to(torch.float32)
        if self.g_idx is None:
            group_size = -(-self.in_features // self.groups)
            groups = torch.arange(self.in_features, device=codes.device) // group_size
        else:
            groups = self.g_idx.long()
        return codes.sub_(zeros[groups]).mul_(scales[groups]).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in] -> [..., out], in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.dequantize(x.dtype).T, bias)

    def extra_repr(self) -> str:
        """For print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"groups={self.groups}, bias={self.bias is not None}, kernel=reference"
        )
