"""QuantLinear: a linear layer that computes from packed weights.

Its buffers have the names and shapes of the GPTQ file format, so its state dict is a checkpoint. Before
the first forward a kernel takes the weight over, in its own memory layout, and the buffers are dropped,
so that there is one copy. `state_dict()`, and a move to another device or dtype, restore the layout of
the file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from roundwise.core.quantized_weight import codes_per_block
from roundwise.inference.kernels.base import Kernel, PackedWeight
from roundwise.inference.kernels.dispatch import choose_kernel

#: Dtypes of x that kernels support; others are multiplied with the dequantized weight.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Buffers that a kernel takes over.
PACKED = ("qweight", "qzeros", "scales", "g_idx")


class QuantLinear(nn.Module):
    """y = x Qᵀ + bias with Q = scales · (codes - zeros), all [out, in].

    Args:
        in_features, out_features: numbers of channels.
        bits: 2, 3, 4 or 8.
        groups: number of groups along the input channels.
        group_size: input channels per group, the last group may have fewer; None: groups are equal.
        bias: True if the layer has a bias.
        stored_g_idx: True if the file has a g_idx, the group of each input channel; False if groups
            are consecutive channels.
        zero_offset: 1 if the file stores zero points minus one (v1), else 0.
        dtype: dtype of the bias.

    Raises:
        ConfigError: another width.
    """

    #: Tells transformers not to initialize it: some of its functions go by the names of classes.
    _is_hf_initialized = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        groups: int,
        group_size: int | None = None,
        bias: bool,
        stored_g_idx: bool = True,
        zero_offset: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        codes_per_block(bits)  # raises for other widths
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        self.bits, self.groups, self.zero_offset = bits, groups, zero_offset
        self.group_size = group_size or -(-in_features // groups)
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
        self.has_bias = bias  # a plain attribute: looking a buffer up takes as long as adding it
        self.bias: torch.Tensor | None
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)
        self.kernel: Kernel | None = None
        self.device: torch.device | None = None
        """Device of the kernel."""

    @property
    def weight(self) -> torch.Tensor:
        """An empty tensor, for model code that reads the dtype or device of a linear's weight.

        Some models initialize `layer.weight` by name when they are loaded; the attribute
        `_is_hf_initialized` makes transformers skip it.
        """
        device = self.device if self.kernel is not None else self.qweight.device
        placeholder = torch.empty(0, dtype=self.dtype, device=device)
        placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
        return placeholder

    def packed(self) -> PackedWeight:
        """Returns the quantized weight in the layout of the file."""
        if self.kernel is not None:
            return self.kernel.packed()
        g_idx = self.g_idx
        if g_idx is None and self.group_size != -(-self.in_features // self.groups):
            # A kernel takes groups without g_idx to be equal; here the last one is smaller.
            channels = torch.arange(self.in_features, dtype=torch.int32, device=self.qweight.device)
            g_idx = channels // self.group_size
        return PackedWeight(
            self.qweight, self.qzeros, self.scales, g_idx, self.bits, self.zero_offset
        )

    def prepare(self, kernel: str | None = None) -> Kernel:
        """Hands the weight to a kernel and drops the buffers, so that one copy remains.

        Args:
            kernel: name of the kernel; None: the best one for this weight and device.

        Raises:
            ConfigError: the named kernel does not exist or does not support this layer.
        """
        weight = self.packed()
        self.device = weight.qweight.device
        chosen = choose_kernel(weight, kernel)
        if self.kernel is None or type(self.kernel) is not chosen:
            self.kernel = chosen(weight)
        for name in PACKED:
            setattr(self, name, None)
        return self.kernel

    def _kernel_for_forward(self) -> Kernel:
        if getattr(getattr(self, "_hf_hook", None), "offload", False):
            # Accelerate has loaded the buffers for this forward and drops them after it: keep nothing.
            weight = self.packed()
            return choose_kernel(weight)(weight)
        return self.prepare()

    def unprepare(self) -> None:
        """Takes the weight back from the kernel: the buffers have the layout of the file again."""
        if self.kernel is not None:
            weight, self.kernel = self.kernel.packed(), None
            for name in PACKED:
                setattr(self, name, getattr(weight, name))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns Qᵀ [in, out], the transpose of a linear's weight: codes are stored in this order."""
        return self.packed().dequantize(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies x [..., in] with the weight and adds the bias.

        Returns:
            [..., out], in the dtype of x.
        """
        kernel = self.kernel or self._kernel_for_forward()
        if x.dtype not in KERNEL_DTYPES:
            y = x @ self.dequantize(x.dtype)
        elif x.requires_grad and torch.is_grad_enabled():
            y = _KernelFunction.apply(x, kernel)  # type: ignore[no-untyped-call]
        else:
            y = kernel(x)
        if self.has_bias:
            assert self.bias is not None
            y = y + self.bias.to(y.dtype)
        return y

    def extra_repr(self) -> str:
        """Returns the sizes and the kernel, for print(model)."""
        kernel = self.kernel.name if self.kernel else "not chosen yet"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"groups={self.groups}, bias={self.has_bias}, kernel={kernel}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        # Buffers move to another device or dtype in the layout of the file; the next forward chooses a
        # kernel there.
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


class _KernelFunction(torch.autograd.Function):
    """A kernel's product with a gradient for x only: adapters can be trained, the codes are fixed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kernel: Kernel) -> torch.Tensor:
        ctx.kernel = kernel
        return kernel(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ ctx.kernel.packed().dequantize(grad.dtype).T, None
