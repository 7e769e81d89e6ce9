"""GPTQ in its LDL form: rounds the columns of W one after another, each making up for those before.

With Ĥ = U D Uᵀ (core.factor) the layer's loss splits into one term per column,

    tr((T - Q) Ĥ (T - Q)ᵀ) = Σ_j D_j (t_j - q_j)²,    t_j = T_j + Σ_{i<j} (T_i - q_i) U[i, j]

so q_j = round(t_j) is the greedy choice, column by column. These are the codes of the published
recursion (Frantar et al. 2022, algorithm 1), which pushes each error forward through the Cholesky
factor of Ĥ⁻¹; here past errors are looked *back* at through a panel of U, so that no inverse is
needed and finished columns are never rewritten. Rows are independent given Ĥ. T is W, or W corrected
for what earlier layers lost (core.correct).

Settings are compared on a few rows of a weight: rows are independent, so some stand for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.act_order import ColumnOrder, permuted_columns, processing_order
from roundwise.core.drift import corrected_target
from roundwise.core.grid import Grid, decode, encode, minmax
from roundwise.core.grid_search import best_grids
from roundwise.core.linalg import Factor, all_finite, factor, matmul
from roundwise.core.output_weighting import OutputWeighting, ProcessGroup, row_parts
from roundwise.core.quantized_weight import QuantizedWeight
from roundwise.core.refine import refine
from roundwise.core.rounding import ColumnSweep
from roundwise.errors import ConfigError, NumericalError
from roundwise.system.timer import timer

#: Rows of each weight that settings are compared on.
ROWS = 128


def sample_rows(W: torch.Tensor) -> slice:
    """At most `ROWS` rows of a weight [out, in], evenly spaced."""
    return slice(0, None, -(-W.shape[0] // ROWS))


#: Rows of a weight, and columns of H, multiplied at a time for the weight's energy.
ENERGY_ROWS, ENERGY_PANEL = 1024, 512
#: Entries of the part of a weight that is solved at a time: what a processor's caches hold, and what
#: an accelerator needs to be busy.
ROW_WORKSPACE, ACCELERATED = 1 << 20, 1 << 24
#: What a quantized weight has for each of its rows.
PER_ROW = ("codes", "scales", "zeros")


class PreparedHessian(NamedTuple):
    """What all weights that read the same input share: H, the order of columns, the factor of H."""

    H: torch.Tensor
    order: ColumnOrder
    factor: Factor


def prepare_hessian(H: torch.Tensor, config: QuantizeConfig) -> PreparedHessian:
    """Orders the columns and factors the Hessian, once for all weights that share it.

    Args:
        H: Hessian XᵀX / n [in, in] of the layer's input (any constant factor cancels); not changed.
        config: its `group_size`, `desc_act`, `order` and `damp_percent` count.

    Raises:
        ConfigError: damping is left open.
        SingularError: H is zero, or no damping makes it definite.
        NumericalError: NaN or infinity in H.
    """
    if config.damp_percent == "auto":
        raise ConfigError(
            "damp_percent=auto is settled by a run, on calibration tokens that it holds out: "
            "give a number, or compare with core.damping.held_out_losses"
        )
    order = processing_order(H.diagonal(), config)
    return PreparedHessian(H, order, factor(H, order.perm, config.damp_percent))


def solve(
    W: torch.Tensor,
    H: torch.Tensor | PreparedHessian,
    config: QuantizeConfig | None = None,
    *,
    target_shift: torch.Tensor | None = None,
    grids: Grid | None = None,
    outputs: torch.Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> QuantizedWeight:
    """Quantizes one weight so that its output on the calibration inputs survives.

    Args:
        W: weight [out, in], any float dtype. Work is done in float32, or float64 if W is float64.
        H: Hessian XᵀX / n [in, in] of the layer's input (any constant factor cancels), or what
            `prepare_hessian` made of it with the same settings.
        config: settings; `dynamic` is not looked at here.
        lost: what earlier layers lost and this one is to make up for, [out, in]; see
            `core.correct.Drift.target_shift`. It is overwritten.
        grids: fixed grids, `scale` and `zero` each [out, groups], instead of searched ones; the
            scales should be float16 values.
        outputs: B [out, out], what errors of two outputs cost together (any constant factor
            cancels); rows then make up for each other (`core.coupling`). None: each for itself.
        helpers: with whom coupled rows are shared, all calling this alike. Others the caller can share.

    Returns:
        Codes in the original channel order, with `relative_error` and the damping used.

    Raises:
        ConfigError: shapes that do not fit.
        SingularError: H is zero, or no damping makes it definite.
        NumericalError: NaN or infinity in W or H.
    """
    config = config or QuantizeConfig()
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    W = _checked(W)
    if isinstance(H, torch.Tensor):
        if H.shape != (W.shape[1], W.shape[1]):
            raise ConfigError(f"H is {tuple(H.shape)}; W {tuple(W.shape)} needs [in, in]")
        H = prepare_hessian(H.to(dtype), config)
    if len(H.H) != W.shape[1]:
        raise ConfigError(f"H has {len(H.H)} channels, W {tuple(W.shape)} has {W.shape[1]}")
    # Taken in parts, all temporaries are small. Unless they are coupled, rows are independent given H.
    parts, sums = [], torch.zeros(3, dtype=torch.float64)
    coupling = (
        None if outputs is None else OutputWeighting(outputs.to(dtype), W.shape[1], process_group)
    )
    step = max(1, workspace(W.device) // W.shape[1])
    target = (
        None
        if target_shift is None
        else corrected_target(W, target_shift.to(dtype), H.order.perm, H.factor)
    )
    with _damped(H):
        for rows in row_parts(len(W), step) if coupling is None else coupling.row_blocks(step):
            fixed = None if grids is None else Grid(grids.scale[rows], grids.zero[rows])
            part = W[rows].to(dtype)
            T = part if target is None else target[rows]
            feedback = T if coupling is None else T + coupling.feedback()
            q, loss = _solve_rows(feedback, H, config, fixed)
            parts.append(q)
            Q = q.dequantize(dtype)
            if coupling is not None:
                coupling.record_errors(T - Q)
                if coupling.idle:
                    continue
            E = part - Q
            if config.refine or feedback is not part:
                loss = H.factor.quadratic(permuted_columns(E, H.order.perm))
            errors = float(E.square().sum())
            loss = max(loss - H.factor.shift * errors, 0.0)
            sums += torch.tensor([loss, errors, float(part.square().sum())])
    if coupling is not None and process_group is not None:
        process_group.all_reduce_sum(sums)
    loss, errors, weights = sums.tolist()
    energy = _energy(W, H.H)
    join = torch.cat if coupling is None else coupling.in_order
    codes, scales, zeros = (join([getattr(q, name) for q in parts]) for name in PER_ROW)
    return replace(
        parts[0],
        codes=codes,
        scales=scales,
        zeros=zeros,
        relative_error=_ratio(loss, energy),
        weight_error=_ratio(errors, weights),
        energy=energy,
        weight_energy=weights,
    )


def _solve_rows(
    T: torch.Tensor, H: PreparedHessian, config: QuantizeConfig, grids: Grid | None
) -> tuple[QuantizedWeight, float]:
    """Rounds and refines some rows of the target T; H.H is damped while this runs.

    The loss is that of rounding, before refinement.
    """
    order, F, keep_scales = H.order, H.factor, grids is not None
    if grids is None and order.fixed_grids:
        D = H.H.diagonal()
        weights = {"minmax": None, "mse": torch.ones_like(D), "pivot": D}[config.grid]
        grids = _original_grids(T, weights, config)
    columns = ColumnSweep(permuted_columns(T, order.perm), F, order, config, grids)
    columns.round_all()
    q = columns.result()
    if config.refine:
        with timer.phase("refine"):
            q = refine(
                q, T, H.H,
                rounds=config.refine, moves=config.exchange, keep_scales=keep_scales,
            )  # fmt: skip
    return q, columns.loss


def round_to_nearest(
    W: torch.Tensor,
    config: QuantizeConfig | None = None,
    *,
    weights: torch.Tensor | None = None,
    fallback: str | None = None,
) -> QuantizedWeight:
    """The baseline: each weight to the nearest point of its group's grid, no Hessian.

    Args:
        W: weight [out, in].
        config: settings; only `bits`, `group_size`, `sym` and `format` matter.
        weights: [in], of squared errors in a search for the grids; None: min-max.
        fallback: recorded in the result when this stands in for `solve`.
    """
    config = config or QuantizeConfig()
    W = _checked(W).to(torch.float64 if W.dtype == torch.float64 else torch.float32)
    grids = _original_grids(W, weights, config)
    g_idx = torch.arange(W.shape[1], device=W.device) // config.columns_per_group(W.shape[1])
    wide = Grid(grids.scale[:, g_idx], grids.zero[:, g_idx])
    codes = encode(W, wide, config.maxq)
    error, energy = (float(X.square().sum()) for X in (W - decode(codes, wide), W))
    return QuantizedWeight(
        codes=codes.to(torch.uint8),
        scales=grids.scale.to(torch.float16),
        zeros=grids.zero.to(torch.int32),
        g_idx=g_idx.to(torch.int32),
        bits=config.bits,
        weight_error=_ratio(error, energy),
        weight_energy=energy,
        fallback=fallback,
    )


def workspace(device: torch.device) -> int:
    """Entries of the part of a weight that is solved at a time."""
    return ROW_WORKSPACE if device.type == "cpu" else ACCELERATED


@contextmanager
def _damped(H: PreparedHessian) -> Iterator[None]:
    """Damping on the diagonal of H.H while the block runs; a damped copy would be as large as H."""
    diagonal = H.H.diagonal().clone()
    H.H.diagonal().add_(H.factor.shift)
    try:
        yield
    finally:
        H.H.diagonal().copy_(diagonal)


def _energy(W: torch.Tensor, H: torch.Tensor) -> float:
    """tr(W H Wᵀ) of W [out, in]; what errors are measured against.

    H is symmetric: each panel of it counts from the diagonal on, twice but for the diagonal's block.
    """
    total = 0.0
    for rows in torch.split(W, ENERGY_ROWS):
        part = rows.to(H.dtype)
        for a in range(0, len(H), ENERGY_PANEL):
            b = min(a + ENERGY_PANEL, len(H))
            panel = H[a:, a:b].clone()
            panel[: b - a] /= 2
            found = matmul(part[:, a:], panel).mul_(part[:, a:b])
            total += 2 * float(found.sum(dtype=torch.float64))
    return total


def _original_grids(T: torch.Tensor, weights: torch.Tensor | None, config: QuantizeConfig) -> Grid:
    """Grids of the original groups of T [out, in] before any column is rounded, each [out, groups].

    Min-max, or the best by squared errors with `weights` [in].
    """
    found = []
    size = config.columns_per_group(T.shape[1])
    for start in range(0, T.shape[1], size):
        part = slice(start, start + size)
        W = T[:, part]
        if weights is None:
            grid = minmax(W, config.maxq, sym=config.sym, min_zero=config.min_zero)
        else:
            best = best_grids(
                W.T,
                weights[part],
                config.maxq,
                sym=config.sym,
                min_zero=config.min_zero,
                keep=1,
                flip_sign=not config.positive_scales,
            )
            grid = Grid(best.scale[0], best.zero[0])
        found.append(grid)
    scales, zeros = zip(*found, strict=True)
    return Grid(torch.stack(scales, dim=1), torch.stack(zeros, dim=1))


def _checked(W: torch.Tensor) -> torch.Tensor:
    if W.ndim != 2 or not W.numel():
        raise ConfigError(f"W is {tuple(W.shape)}; a weight is [out, in]")
    W = W.detach()
    if not all_finite(W):
        raise NumericalError("NaN or infinity in the weight")
    return W


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
