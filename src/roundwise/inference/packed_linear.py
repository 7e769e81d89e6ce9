"""PackedLinear: a `QuantLinear` whose buffers are the tensors of the compressed-tensors format.

Its weight is that of the GPTQ format, transposed, so the same kernels compute with it. Rows of codes
that end within a word are padded to the words that a kernel needs, with channels that add nothing.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn.functional import pad

from roundwise.checkpoint.compressed_tensors import (
    G_IDX,
    PACKED,
    SCALE,
    SHAPE,
    ZERO,
    packed_words,
)
from roundwise.core.quantized_weight import codes_per_block, pack
from roundwise.inference.kernels.base import PackedWeight
from roundwise.inference.quant_linear import QuantLinear


class PackedLinear(QuantLinear):
    """y = x Qᵀ + bias, with the buffers of compressed-tensors; arguments as for `QuantLinear`."""

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    weight_g_idx: torch.Tensor | None
    FILE_TENSORS: ClassVar[tuple[str, ...]] = (PACKED, SCALE, ZERO, G_IDX)

    @property
    def qweight(self) -> torch.Tensor:  # type: ignore[override]
        """The buffer with the codes: PEFT takes the layer's device from it."""
        return self.weight_packed

    def _register_file_tensors(self) -> None:
        rows, columns, groups, bits = self.out_features, self.in_features, self.groups, self.bits
        block = codes_per_block(bits)
        self.in_padding, self.out_padding = -columns % block, -rows % block
        self._register_packed(PACKED, rows, packed_words(columns, bits))
        self.register_buffer(SCALE, torch.zeros(rows, groups, dtype=torch.float16))
        self.register_buffer(SHAPE, torch.zeros(2, dtype=torch.int64))
        if self.stored_zeros:
            self._register_packed(ZERO, packed_words(rows, bits), groups)
        else:
            self.register_buffer(ZERO, None)
        self._register_g_idx(G_IDX)

    def _from_file(self) -> PackedWeight:
        rows, columns = (
            self.out_features + self.out_padding, self.in_features + self.in_padding
        )  # fmt: skip
        words = packed_words(columns, self.bits) - self.weight_packed.shape[1]
        qweight = pad(self.weight_packed, (0, words, 0, self.out_padding)).T.contiguous()
        if self.weight_zero_point is None:
            middle = torch.full(
                (rows, self.groups), 2 ** (self.bits - 1), dtype=torch.int32, device=qweight.device
            )
            qzeros = pack(middle, self.bits).T.contiguous()
        else:
            words = packed_words(rows, self.bits) - len(self.weight_zero_point)
            qzeros = pad(self.weight_zero_point, (0, 0, 0, words)).T.contiguous()
        scales = pad(self.weight_scale, (0, 0, 0, self.out_padding), value=1.0).T.contiguous()
        g_idx = self._channel_groups(self.weight_g_idx)
        if self.in_padding:
            if g_idx is None:
                channels = torch.arange(self.in_features, dtype=torch.int32, device=qweight.device)
                g_idx = channels // self.group_size
            g_idx = pad(g_idx, (0, self.in_padding), value=self.groups - 1)
        return PackedWeight(qweight, qzeros, scales, g_idx, self.bits, zero_offset=0)

    def _to_file(self, weight: PackedWeight) -> dict[str, torch.Tensor | None]:
        rows, columns = self.out_features, self.in_features
        words, zero_words = packed_words(columns, self.bits), packed_words(rows, self.bits)
        g_idx = weight.g_idx if self.stored_g_idx else None
        return {
            PACKED: weight.qweight.T[:rows, :words].contiguous(),
            SCALE: weight.scales.T[:rows].contiguous(),
            ZERO: weight.qzeros.T[:zero_words].contiguous() if self.stored_zeros else None,
            G_IDX: g_idx if g_idx is None else g_idx[:columns],
        }
