"""Slow, obvious, float64: the fast code is tested against this.

`gptq` is algorithm 1 of Frantar et al. 2022, one column at a time, with the Cholesky factor of H⁻¹ and
errors pushed forward. `gptq_in_order` is the same for any processing order and any grid, and says where
rounding is a tie. `obq` is Optimal Brain Quantization (Frantar & Alistarh 2022) with its greedy order,
one row at a time, updating H⁻¹ after each weight. None shares code with the package but the processing
order, which has tests of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from roundwise.core.act_order import ColumnOrder


def gptq(
    W: torch.Tensor, H: torch.Tensor, *, bits: int, group_size: int, damp_percent: float = 0.01
) -> torch.Tensor:
    """GPTQ as published, on symmetric min-max grids: returns Q [out, in] for W [out, in]."""
    W, H, Q = W.double().clone(), H.double(), torch.zeros_like(W, dtype=torch.float64)
    maxq, zero = 2**bits - 1, 2 ** (bits - 1)
    damping = damp_percent * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    # Row j of C: how the columns from j on best answer to an error in column j.
    C = torch.linalg.cholesky(torch.linalg.inv(H + damping), upper=True)
    for j in range(W.shape[1]):
        if j % group_size == 0:
            # The grid of a group covers its weights as the columns before it have changed them.
            largest = W[:, j : j + group_size].abs().amax(dim=1)
            scale = (2 * largest / maxq).to(torch.float16).double()
        code = ((W[:, j] / scale).round() + zero).clamp(0, maxq)
        Q[:, j] = scale * (code - zero)
        error = (W[:, j] - Q[:, j]) / C[j, j]
        W[:, j + 1 :] -= torch.outer(error, C[j, j + 1 :])
    return Q


@dataclass
class OracleResult:
    codes: torch.Tensor  # [out, in], original channel order
    Q: torch.Tensor  # [out, in]
    margin: torch.Tensor  # [out, in]: distance of t/s from the nearest rounding tie


def fp16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float16).to(x.dtype)


def minmax_grid(w: torch.Tensor, bits: int, sym: bool, min_zero: int) -> tuple[float, float]:
    """Scale and zero of one row's group, written with plain numbers."""
    maxq = 2**bits - 1
    low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    if low == high:
        low, high = -1.0, 1.0
    if sym:
        m = max(-low, high)
        return float(fp16(torch.tensor(2 * m / maxq, dtype=torch.float64))), (maxq + 1) // 2
    s = (high - low) / maxq
    if round(-low / s) < min_zero:
        s = high / (maxq - min_zero)
    s = float(fp16(torch.tensor(s, dtype=torch.float64)))
    return s, min(max(round(-low / s), min_zero), maxq)


def damped(H: torch.Tensor, damp: float) -> torch.Tensor:
    H = H.double()
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def gptq_in_order(
    W: torch.Tensor,
    H: torch.Tensor,
    order: ColumnOrder,
    *,
    bits: int,
    sym: bool,
    damp: float = 0.01,
    min_zero: int = 1,
    fixed: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> OracleResult:
    """`gptq` in any order and on any grid; `fixed`: scale and zero [out, groups] known beforehand."""
    maxq = 2**bits - 1
    rows, width = W.shape
    perm = order.perm
    W = W.double()[:, perm].clone()
    Hinv = torch.linalg.inv(damped(H, damp)[perm][:, perm])
    C = torch.linalg.cholesky((Hinv + Hinv.T) / 2, upper=True)
    codes = torch.zeros(rows, width, dtype=torch.int64)
    Q, margin = torch.zeros_like(W), torch.zeros_like(W)
    groups = int(order.group.max()) + 1
    scale, zero = fixed or (torch.zeros(rows, groups).double(), torch.zeros(rows, groups).double())
    seen: set[int] = set()
    for j in range(width):
        g = int(order.group[j])
        if fixed is None and g not in seen:
            members = [i for i in range(width) if int(order.group[i]) == g]
            for row in range(rows):
                scale[row, g], zero[row, g] = minmax_grid(W[row, members], bits, sym, min_zero)
        seen.add(g)
        s, z = scale[:, g], zero[:, g]
        x = W[:, j] / s
        margin[:, j] = 0.5 - (x - x.round()).abs()
        codes[:, j] = (x.round() + z).clamp(0, maxq).long()
        Q[:, j] = s * (codes[:, j] - z)
        error = (W[:, j] - Q[:, j]) / C[j, j]
        W[:, j + 1 :] -= torch.outer(error, C[j, j + 1 :])
    back = torch.argsort(perm)
    return OracleResult(codes[:, back], Q[:, back], margin[:, back])


def obq(w: torch.Tensor, H: torch.Tensor, scale: float, zero: int, maxq: int) -> torch.Tensor:
    """One row, greedy: always the weight whose rounding costs least next."""
    w = w.double().clone()
    Hinv = torch.linalg.inv(H.double())
    left = list(range(len(w)))
    q = torch.zeros_like(w)
    while left:
        codes = {i: min(max(round(float(w[i]) / scale) + zero, 0), maxq) for i in left}
        rounded = {i: scale * (code - zero) for i, code in codes.items()}
        i = min(left, key=lambda k: (rounded[k] - float(w[k])) ** 2 / float(Hinv[k, k]))
        q[i] = rounded[i]
        w -= (w[i] - q[i]) / Hinv[i, i] * Hinv[:, i]
        Hinv -= torch.outer(Hinv[:, i], Hinv[i]) / Hinv[i, i]
        left.remove(i)
    return q


def output_error(W: torch.Tensor, Q: torch.Tensor, H: torch.Tensor) -> float:
    """tr((W - Q) H (W - Q)ᵀ)."""
    E = W.double() - Q.double()
    return float(((E @ H.double()) * E).sum())
