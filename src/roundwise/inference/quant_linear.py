"""QuantLinear: a linear layer that computes from packed weights.

Its buffers carry the names and shapes of the file format, so a state dict is a checkpoint. Before the
first product a kernel takes them over, in the layout it computes from, so that there is one copy; who
asks for the state dict, or moves the layer elsewhere, gets the file's layout back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from roundwise.core.quantized_weight import codes_per_block
from roundwise.inference.kernels.base import Kernel, PackedWeight
from roundwise.inference.kernels.dispatch import choose

#: What kernels multiply; anything else goes through the dequantized weight.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PACKED = ("qweight", "qzeros", "scales", "g_idx")


class QuantLinear(nn.Module):
    """y = x Qᵀ + bias with Q = scales · (codes - zeros), all [out, in].

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
        self.has_bias = bias  # looking a buffer up takes as long as adding it
        self.bias: torch.Tensor | None
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)
        self.kernel: Kernel | None = None
        self.device: torch.device | None = None  # where the kernel is

    @property
    def weight(self) -> torch.Tensor:
        """Empty: for model code that asks a linear's weight for its dtype or device.

        Some models initialise `layer.weight` by name when they are loaded; the mark makes
        transformers pass over it.
        """
        device = self.device if self.kernel is not None else self.qweight.device
        stand_in = torch.empty(0, dtype=self.dtype, device=device)
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
        return stand_in

    def packed(self) -> PackedWeight:
        """The quantized weight in the file's layout."""
        if self.kernel is not None:
            return self.kernel.packed()
        return PackedWeight(
            self.qweight, self.qzeros, self.scales, self.g_idx, self.bits, self.zero_offset
        )

    def prepare(self, kernel: str | None = None) -> Kernel:
        """Hands the weight to a kernel, by name or the best there is, and keeps no other copy.

        Raises:
            ConfigError: the named kernel cannot compute this layer.
        """
        weight = self.packed()
        self.device = weight.qweight.device
        chosen = choose(weight, kernel)
        if self.kernel is None or type(self.kernel) is not chosen:
            self.kernel = chosen(weight)
        for name in PACKED:
            setattr(self, name, None)
        return self.kernel

    def _kernel(self) -> Kernel:
        if getattr(getattr(self, "_hf_hook", None), "offload", False):
            # Accelerate has brought the buffers here for this product, and takes them away again.
            weight = self.packed()
            return choose(weight)(weight)
        return self.prepare()

    def unprepare(self) -> None:
        """Takes the weight back from the kernel: the buffers are those of the file again."""
        if self.kernel is not None:
            weight, self.kernel = self.kernel.packed(), None
            for name in PACKED:
                setattr(self, name, getattr(weight, name))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Q as [in, out]: the transpose of a linear's weight, which is how it is stored."""
        return self.packed().dequantize(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in] -> [..., out], in the dtype of x."""
        kernel = self.kernel or self._kernel()
        if x.dtype not in KERNEL_DTYPES:
            y = x @ self.dequantize(x.dtype)
        elif x.requires_grad and torch.is_grad_enabled():
            y = _Product.apply(x, kernel)  # type: ignore[no-untyped-call]
        else:
            y = kernel(x)
        if self.has_bias:
            assert self.bias is not None
            y = y + self.bias.to(y.dtype)
        return y

    def extra_repr(self) -> str:
        """For print(model)."""
        kernel = self.kernel.name if self.kernel else "not chosen yet"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"groups={self.groups}, bias={self.has_bias}, kernel={kernel}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        # To another device or dtype: as the file has it. The next product chooses a kernel there.
        self.unprepare()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not None:
            weight = self.kernel.packed()
            for name in PACKED:
                tensor = getattr(weight, name)
                if tensor is not None:
                    destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unprepare()
        super()._load_from_state_dict(*args)


class _Product(torch.autograd.Function):
    """The kernel's product, with a gradient for the input: adapters train, the codes stay."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kernel: Kernel) -> torch.Tensor:
        ctx.kernel = kernel
        return kernel(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ ctx.kernel.packed().dequantize(grad.dtype).T, None
