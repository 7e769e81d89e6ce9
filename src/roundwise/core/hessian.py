"""Hessian of a linear layer's output error, and cross moments, summed over calibration batches.

For the objective ||WX - QX||² the Hessian with respect to each row of Q is H = 2 XXᵀ, the same for
all rows (Frantar et al. 2022, section 3). A constant factor cancels everywhere, so the mean
H = XᵀX / n over n tokens is kept, with X [tokens, in].
"""

from __future__ import annotations

import torch

from roundwise.core.backends import cpp
from roundwise.errors import NumericalError
from roundwise.system.device import HOST

#: Columns of a tile of the symmetric update; narrower tiles would be slower than one product.
TILE = 512


def unmasked_rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Returns the rows of `x` [..., in] that `mask` does not exclude, as [tokens, in]."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows.contiguous() if mask is None else rows[mask.reshape(-1)]


def uses_native(x: torch.Tensor, total: torch.Tensor) -> bool:
    """Returns whether the extension adds products of `x` to `total`.

    Products of bfloat16 values are exact in float32, so the result is as exact as after converting
    them; where the processor has an instruction for them, it takes half the time.
    """
    cpu = x.device.type == "cpu" and total.dtype == torch.float32
    return cpu and cpp.product_dtype(x.dtype) is not None


def uses_tensor_cores(x: torch.Tensor, total: torch.Tensor) -> bool:
    """Returns whether `x`, in half precision, is multiplied by tensor cores, with float32 sums."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.device.type == "cuda" and half and total.dtype == torch.float32


def add_moment(
    total: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *, lower: bool = False
) -> None:
    """Adds Aᵀ B to `total` in place.

    Args:
        total: [m, k], float32 or float64.
        A: [n, m], in `moment_dtype`.
        B: [n, k], in `moment_dtype`.
        lower: A is B; tiles above the diagonal are not computed.
    """
    if uses_native(A, total):
        cpp.add_moment(total, A, B, lower=lower)
        return
    width = TILE if lower else total.shape[1]
    for start in range(0, total.shape[1], width):
        columns = slice(start, start + width)
        rows = slice(start if lower else 0, None)
        part, left, right = total[rows, columns], A[:, rows].T, B[:, columns]
        if A.dtype == total.dtype:
            part.addmm_(left, right)
        else:
            part.add_(torch.mm(left, right, out_dtype=total.dtype))


def moment_dtype(x: torch.Tensor, total: torch.Tensor) -> torch.dtype:
    """Returns the dtype in which `x` is multiplied for a product that is added to `total`."""
    return x.dtype if uses_native(x, total) or uses_tensor_cores(x, total) else total.dtype


class Hessian:
    """Sum of XᵀX over the batches of one layer input X [tokens, in].

    Only the lower triangle is computed while summing, which is half the work.

    Args:
        in_features: channels of the input.
        dtype: of the sum, float32 or float64.
        device: of the sum.
    """

    def __init__(
        self,
        in_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device = HOST,
    ) -> None:
        self.sum = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Adds the inputs of one batch.

        Args:
            x: [..., in], any float dtype.
            mask: bool, shape of `x` without its last axis; False marks padding, which is skipped.

        Raises:
            NumericalError: an entry of `x` that is not padding is NaN or infinite, or its square
                overflows.
        """
        rows = unmasked_rows(x, mask)
        rows = rows.to(moment_dtype(rows, self.sum))
        add_moment(self.sum, rows, rows, lower=True)
        self.tokens += rows.shape[0]
        # A NaN or infinity in channel k reaches H[k, k] whatever the signs: the diagonal is enough.
        bad = (~torch.isfinite(self.sum.diagonal())).nonzero().flatten()
        if len(bad):
            raise NumericalError(
                f"NaN, infinite or overflowing input in {len(bad)} of {rows.shape[1]} channels "
                f"(first: channel {int(bad[0])})"
            )

    def mean(self) -> torch.Tensor:
        """Returns H = XᵀX / n, [in, in], symmetric, as a copy; zeros if no token was added."""
        return self._mean(self.sum.clone())

    def take_mean(self) -> torch.Tensor:
        """Returns the same as `mean`, in the memory of the sum, which is gone afterwards."""
        H, self.sum = self.sum, torch.empty(0)
        return self._mean(H)

    def _mean(self, H: torch.Tensor) -> torch.Tensor:
        """Divides the sum H by the number of tokens and completes its upper triangle, in place."""
        H /= max(self.tokens, 1)
        width = H.shape[0]
        for start in range(0, width, TILE):
            stop = min(start + TILE, width)
            square = H[start:stop, start:stop].tril()
            H[start:stop, start:stop] = square + square.tril(-1).T
            H[start:stop, stop:] = H[stop:, start:stop].T
        return H


class CrossMoment:
    """Sum of (Ỹ - Y)ᵀX: cross moment of the distance Ỹ - Y from the original model with the input X.

    Args:
        rows: channels of Y.
        columns: channels of X.
        dtype: of the sum, float32 or float64.
        device: of the sum.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device = HOST,
    ) -> None:
        self.sum = torch.zeros(rows, columns, dtype=dtype, device=device)
        self.tokens = 0

    def add(
        self,
        original: torch.Tensor,
        y: torch.Tensor,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        more: torch.Tensor | None = None,
    ) -> None:
        """Adds one batch.

        Args:
            original: Ỹ [..., rows], of the original model.
            y: Y [..., rows], of the quantized model.
            x: X [..., columns], the layer's input in the quantized model.
            mask: as for `Hessian.add`.
            more: [..., rows], added to the distance Ỹ - Y.
        """
        y, x, original = (unmasked_rows(each, mask) for each in (y, x, original))
        self.tokens += len(x)
        # A product in half precision takes a distance in half precision: compute it there at once.
        dtype = moment_dtype(x, self.sum)
        distance = original.to(dtype) - y.to(dtype)
        if more is not None:
            distance += unmasked_rows(more, mask)
        add_moment(self.sum, distance, x.to(dtype))

    def take_mean(self) -> torch.Tensor:
        """Returns (Ỹ - Y)ᵀX / n, [rows, columns], in the memory of the sum, which is gone afterwards."""
        moment, self.sum = self.sum, torch.empty(0)
        return moment.div_(max(self.tokens, 1))
