"""QuantLinear: a linear layer that computes from packed weights.

Its buffers have the names and shapes of the GPTQ file format, so its state dict is a checkpoint. Before
the first forward a kernel takes the weight over, in its own memory layout, and the buffers are dropped,
so that there is one copy. `state_dict()`, and a move to another device or dtype, restore the layout of
the file.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from roundwise.core.quantized_weight import codes_per_block
from roundwise.inference.kernels.base import Kernel, PackedWeight
from roundwise.inference.kernels.dispatch import choose_kernel

#: Dtypes of x that kernels support; others are multiplied with the dequantized weight.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class QuantLinear(nn.Module):
    """y = x Qᵀ + bias with Q = scales · (codes - zeros), all [out, in].

    `PackedLinear` has the buffers of compressed-tensors instead.

    Args:
        in_features, out_features: numbers of channels.
        bits: 2 to 8.
        groups: number of groups along the input channels.
        group_size: input channels per group, the last group may have fewer; None: groups are equal.
        bias: True if the layer has a bias.
        stored_g_idx: True if the file has a g_idx, the group of each input channel; False if groups
            are consecutive channels.
        stored_zeros: False if the file has no zero points, because all are in the middle.
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
        stored_zeros: bool = True,
        zero_offset: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        codes_per_block(bits)  # raises for other widths
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        self.bits, self.groups, self.zero_offset = bits, groups, zero_offset
        self.group_size = group_size or -(-in_features // groups)
        self.stored_g_idx, self.stored_zeros = stored_g_idx, stored_zeros
        self.in_padding = self.out_padding = 0
        self._register_file_tensors()
        self.has_bias = bias  # a plain attribute: looking a buffer up takes as long as adding it
        self.bias: torch.Tensor | None
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)
        self.kernel: Kernel | None = None
        self.device: torch.device | None = None
        """Device of the kernel."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor | None
    #: Buffers that a kernel takes over; the first one holds the codes.
    FILE_TENSORS: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def _register_file_tensors(self) -> None:
        """Creates the buffers that have the names and shapes of the tensors in the file."""
        words = self.in_features * self.bits // 32
        zero_words = self.out_features * self.bits // 32
        self._register_packed("qweight", words, self.out_features)
        self._register_packed("qzeros", self.groups, zero_words)
        scales = torch.zeros(self.groups, self.out_features, dtype=torch.float16)
        self.register_buffer("scales", scales)
        self._register_g_idx("g_idx")

    def _register_packed(self, name: str, *shape: int) -> None:
        self.register_buffer(name, torch.zeros(*shape, dtype=torch.int32))

    def _register_g_idx(self, name: str) -> None:
        channels = torch.zeros(self.in_features, dtype=torch.int32)
        self.register_buffer(name, channels if self.stored_g_idx else None)

    def _from_file(self) -> PackedWeight:
        """Returns the weight in the file's buffers."""
        return PackedWeight(
            self.qweight, self.qzeros, self.scales, self._channel_groups(self.g_idx), self.bits,
            self.zero_offset,
        )  # fmt: skip

    def _to_file(self, weight: PackedWeight) -> dict[str, torch.Tensor | None]:
        """Returns the file's buffers of a weight: the inverse of `_from_file`."""
        return {
            "qweight": weight.qweight, "qzeros": weight.qzeros, "scales": weight.scales,
            "g_idx": weight.g_idx if self.stored_g_idx else None,
        }  # fmt: skip

    def _channel_groups(self, g_idx: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the group of each channel that a kernel is told; None: groups are of equal size."""
        if g_idx is not None or self.group_size == -(-self.in_features // self.groups):
            return g_idx
        # A kernel takes groups without g_idx to be equal; here the last one is smaller.
        device = self.file_codes.device
        channels = torch.arange(self.in_features, dtype=torch.int32, device=device)
        return channels // self.group_size

    @property
    def file_codes(self) -> torch.Tensor:
        """The buffer with the codes."""
        codes: torch.Tensor = getattr(self, self.FILE_TENSORS[0])
        return codes

    @property
    def weight(self) -> torch.Tensor:
        """An empty tensor, for model code that reads the dtype or device of a linear's weight.

        Some models initialize `layer.weight` by name when they are loaded; the attribute
        `_is_hf_initialized` makes transformers skip it.
        """
        device = self.device if self.kernel is not None else self.file_codes.device
        placeholder = torch.empty(0, dtype=self.dtype, device=device)
        placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
        return placeholder

    def packed(self) -> PackedWeight:
        """Returns the quantized weight in the layout of the GPTQ file format."""
        if self.kernel is not None:
            return self.kernel.packed()
        return self._from_file()

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
        for name in self.FILE_TENSORS:
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
            for name, tensor in self._to_file(weight).items():
                setattr(self, name, tensor)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns Qᵀ [in, out], the transpose of a linear's weight: codes are stored in this order."""
        return self.packed().dequantize(dtype)[: self.in_features, : self.out_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies x [..., in] with the weight and adds the bias.

        Returns:
            [..., out], in the dtype of x.
        """
        y = self._multiply(x) if x.dtype in KERNEL_DTYPES else x @ self.dequantize(x.dtype)
        if self.has_bias:
            assert self.bias is not None
            y = y + self.bias.to(y.dtype)
        return y

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.kernel or self._kernel_for_forward()
        if self.in_padding:
            x = nn.functional.pad(x, (0, self.in_padding))
        if x.requires_grad and torch.is_grad_enabled():
            y: torch.Tensor = _KernelFunction.apply(x, kernel)  # type: ignore[no-untyped-call]
        else:
            y = kernel(x)
        return y[..., : self.out_features] if self.out_padding else y

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
            for name, tensor in self._to_file(self.kernel.packed()).items():
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
