"""Large unquantized linear layers on the CPU, such as heads: the weight is read once per product."""

from __future__ import annotations

import torch
from torch import nn

from roundwise.core.backends import cpp
from roundwise.inference.kernels.cpp import DTYPE_CODES

#: Most rows for which one pass over the weight is faster than torch's product.
MAX_ROWS = 2
#: Entries of the smallest weight that is worth it.
LARGE = 1 << 20


class StreamedLinear(nn.Linear):
    """Linear layer in float16 or bfloat16 that multiplies one or two rows with the C++ extension.

    torch reads such weights at half of the memory bandwidth or less; beside quantized blocks a model's
    head then takes as long as all of them. Parameters and state dict are those of nn.Linear.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiplies input [..., in] with the weight; returns [..., out]."""
        if input.numel() > MAX_ROWS * self.in_features or not self._supports(input):
            return super().forward(input)
        x = input.contiguous()
        y = x.new_empty((*x.shape[:-1], self.out_features))
        rows = x.numel() // self.in_features
        module = cpp.load()[0]
        assert module is not None
        module.dense(
            x.data_ptr(), self.weight.data_ptr(), y.data_ptr(), rows, self.in_features,
            self.out_features, DTYPE_CODES[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return y if self.bias is None else y + self.bias

    def _supports(self, x: torch.Tensor) -> bool:
        """Tells whether the extension can compute this product: no gradients, and matching dtypes."""
        weight = self.weight
        return (
            not torch.compiler.is_compiling()
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            and x.numel() > 0
            and x.shape[-1] == self.in_features
            and x.dtype == weight.dtype
            and x.device == weight.device
            and supports_weight(self)
        )


def supports_weight(layer: nn.Linear) -> bool:
    """Tells whether the extension can multiply with a layer's weight."""
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float16, torch.bfloat16)
        and weight.shape[1] % 32 == 0
        and weight.is_contiguous()
        and cpp.load()[0] is not None
    )


def use_streamed_linears(model: nn.Module) -> None:
    """Turns the large plain linear layers of a model into `StreamedLinear` layers, in place."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= LARGE and supports_weight(module):
            module.__class__ = StreamedLinear
