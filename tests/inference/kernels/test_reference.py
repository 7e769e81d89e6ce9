"""The reference kernel multiplies with the dequantized weight, whatever the file holds."""

from __future__ import annotations

import pytest
import torch

from roundwise.core.quantized_weight import WIDTHS
from roundwise.inference.kernels.reference import ReferenceKernel
from tests.inference.kernels.packed import FLOATS, random_weight


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("act_order", [False, True])
def test_is_a_product_with_the_weight(bits: int, act_order: bool) -> None:
    weight = random_weight(bits, 96, 64, 20, sym=False, act_order=act_order)
    x = torch.randn(2, 3, 96, dtype=torch.float64)
    expected = torch.einsum("abi,io->abo", x, weight.dequantize(torch.float64))
    assert ReferenceKernel.unsupported_reason(weight) is None
    torch.testing.assert_close(ReferenceKernel(weight)(x), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_returns_the_dtype_of_x(dtype: torch.dtype) -> None:
    weight = random_weight(4, 64, 32)
    assert ReferenceKernel(weight)(torch.randn(2, 64).to(dtype)).dtype == dtype


def test_gives_back_the_same_weight() -> None:
    weight = random_weight(4, 64, 32)
    assert ReferenceKernel(weight).packed() is weight
