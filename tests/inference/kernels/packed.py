"""Random packed weights, and the layers that hold them, for tests of kernels."""

from __future__ import annotations

import torch

from roundwise.core.quantized_weight import pack
from roundwise.inference.kernels.base import PackedWeight
from roundwise.inference.quant_linear import QuantLinear

#: Dtypes of x that every kernel supports.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: Tensors of a layer in the file.
FILE = ("qweight", "qzeros", "scales", "g_idx")


def random_weight(
    bits: int, in_features: int, out_features: int, group_size: int = -1, *, seed: int = 0,
    sym: bool = True, act_order: bool = False, stored_g_idx: bool = True, zero_offset: int = 1,
    scales: torch.dtype = torch.float16, device: str = "cpu",
) -> PackedWeight:  # fmt: skip
    """A packed weight of random codes and scales of both signs; random zero points unless `sym`."""
    generator = torch.Generator().manual_seed(seed)
    group_size = in_features if group_size == -1 else min(group_size, in_features)
    groups = -(-in_features // group_size)
    codes = torch.randint(0, 2**bits, (in_features, out_features), generator=generator)
    zeros = torch.full((groups, out_features), 2 ** (bits - 1))
    if not sym:
        zeros = torch.randint(0, 2**bits, zeros.shape, generator=generator)
    sizes = torch.rand(groups, out_features, generator=generator) * 0.01 + 0.001
    sizes *= torch.where(torch.rand(sizes.shape, generator=generator) < 0.2, -1, 1)
    g_idx = torch.arange(in_features) // group_size
    if act_order:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    stored = ((zeros - zero_offset) & (2**bits - 1)).T.contiguous()
    return PackedWeight(
        pack(codes, bits).to(device), pack(stored, bits).T.contiguous().to(device),
        sizes.to(scales).to(device),
        g_idx.to(torch.int32).to(device) if stored_g_idx or act_order else None, bits, zero_offset,
    )  # fmt: skip


def layer_of(weight: PackedWeight, bias: bool = True) -> QuantLinear:
    """A layer with this weight, loaded as from a file."""
    linear = QuantLinear(
        weight.in_features, weight.out_features, bits=weight.bits, groups=weight.groups, bias=bias,
        stored_g_idx=weight.g_idx is not None, zero_offset=weight.zero_offset, dtype=torch.float32,
    )  # fmt: skip
    tensors = {name: getattr(weight, name) for name in FILE if getattr(weight, name) is not None}
    if bias:
        tensors["bias"] = torch.arange(weight.out_features) / 8
    linear.load_state_dict(tensors)
    return linear.to(weight.qweight.device)


def assert_same_file(one: PackedWeight, other: PackedWeight) -> None:
    """Both weights are the same in the file, bit for bit."""
    assert (one.bits, one.zero_offset) == (other.bits, other.zero_offset)
    for name in FILE:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name
