"""Large linear layers that are not quantized, such as heads: read once, at the speed of memory."""

from __future__ import annotations

import torch
from torch import nn

from roundwise.core.backends import cpp
from roundwise.inference.kernels.cpp import TYPES

#: Rows for which one pass over the weight beats torch's product, and weights from which on it matters.
ROWS, LARGE = 2, 1 << 20


class StreamedLinear(nn.Linear):
    """A linear layer in float16 or bfloat16 whose products with one or two rows are native.

    Torch reads such weights at half the speed of memory or less; beside quantized blocks the head of a
    model then takes as long as all of them. Parameters, state dict and everything else are nn.Linear's.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if input.numel() > ROWS * self.in_features or not self._streams(input):
            return super().forward(input)
        x = input.contiguous()
        y = x.new_empty((*x.shape[:-1], self.out_features))
        rows = x.numel() // self.in_features
        module = cpp.load()[0]
        assert module is not None
        module.dense(
            x.data_ptr(), self.weight.data_ptr(), y.data_ptr(), rows, self.in_features,
            self.out_features, TYPES[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return y if self.bias is None else y + self.bias

    def _streams(self, x: torch.Tensor) -> bool:
        weight = self.weight
        return (
            not torch.compiler.is_compiling()
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            and x.numel() > 0
            and x.shape[-1] == self.in_features
            and x.dtype == weight.dtype
            and x.device == weight.device
            and is_worth_streaming(self)
        )


def is_worth_streaming(layer: nn.Linear) -> bool:
    """Whether a layer's weight is one that the native product takes."""
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float16, torch.bfloat16)
        and weight.shape[1] % 32 == 0
        and weight.is_contiguous()
        and cpp.load()[0] is not None
    )


def stream_large(model: nn.Module) -> None:
    """Makes StreamedLinear layers of a model's large plain ones, in place."""
    for module in model.modules():
        if (
            type(module) is nn.Linear
            and module.weight.numel() >= LARGE
            and is_worth_streaming(module)
        ):
            module.__class__ = StreamedLinear
