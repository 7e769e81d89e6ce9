"""GPTQ in its LDL form: rounds the columns of W one after another, each compensating for earlier errors.

With Ĥ = U D Uᵀ (`core.linalg.factor`) the layer's loss splits into one term per column,

    tr((T - Q) Ĥ (T - Q)ᵀ) = Σ_j D_j (t_j - q_j)²,    t_j = T_j + Σ_{i<j} (T_i - q_i) U[i, j]

so q_j = round(t_j) is the greedy choice, column by column. These are the codes of the published
recursion (Frantar et al. 2022, algorithm 1), which pushes each error forward through the Cholesky
factor of Ĥ⁻¹. Here a column looks *back* at earlier errors through U instead, so that no inverse is
needed and finished columns are never rewritten. Rows are independent given Ĥ. The target T is W, or W
corrected for the errors of earlier layers (`core.drift`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch

from roundwise.config import QuantizeConfig
from roundwise.core.act_order import ColumnOrder, processing_order
from roundwise.core.backends.base import SolverBackend
from roundwise.core.backends.dispatch import choose_backend
from roundwise.core.drift import corrected_target
from roundwise.core.grid import Grid, GridSpec, decode, encode, minmax
from roundwise.core.linalg import Factor, all_finite, factor, matmul, permuted_columns
from roundwise.core.output_weighting import OutputWeighting, ProcessGroup, row_parts
from roundwise.core.quantized_weight import QuantizedWeight
from roundwise.core.refine import refine
from roundwise.core.rounding import ColumnSweep
from roundwise.errors import ConfigError, NumericalError
from roundwise.system.timer import timer

#: Rows of each weight that settings are compared on.
ROWS = 128
#: Rows of a weight, and columns of H, multiplied at a time for the weight's energy.
ENERGY_ROWS, ENERGY_PANEL = 1024, 512
#: Entries of the part of a weight that is solved at a time: on the CPU as many as fit its caches, on an
#: accelerator as many as keep it busy.
ROW_WORKSPACE, ACCELERATOR_WORKSPACE = 1 << 20, 1 << 24
#: Fields of a `QuantizedWeight` that have an entry for each row.
FIELDS_BY_ROW = ("codes", "scales", "zeros")


def sample_rows(W: torch.Tensor) -> slice:
    """Returns at most `ROWS` rows of a weight [out, in], evenly spaced, to compare settings on.

    Rows are independent given H, so a few of them stand for all.
    """
    return slice(0, None, -(-W.shape[0] // ROWS))


class PreparedHessian(NamedTuple):
    """H, the order of columns, and the factor: shared by all weights that read the same input."""

    H: torch.Tensor
    order: ColumnOrder
    factor: Factor


def prepare_hessian(H: torch.Tensor, config: QuantizeConfig) -> PreparedHessian:
    """Orders the columns and factors the Hessian, once for all weights that share it.

    Args:
        H: Hessian XᵀX / n [in, in] of the layer's input (any constant factor cancels); not changed.
        config: `group_size`, `desc_act`, `order` and `damp_percent` are used.

    Raises:
        SingularError: H is zero, or no damping makes it definite.
        NumericalError: NaN or infinity in H.
    """
    order = processing_order(H.diagonal(), config)
    return PreparedHessian(H, order, factor(H, order.perm, config.damp_percent))


def grid_spec(config: QuantizeConfig) -> GridSpec:
    """Returns the rules for the grids of a weight that these settings ask for."""
    return GridSpec(
        bits=config.bits,
        sym=config.sym,
        # v1 files store zero - 1: a zero of 0 would come back as 2^bits in some readers.
        min_zero=1 if config.format == "gptq" else 0,
        flip_sign=not config.positive_scales,
        search=config.grid,
        keep=1 if config.grid == "minmax" else config.grid_candidates,
    )


def solve(
    W: torch.Tensor,
    H: torch.Tensor | PreparedHessian,
    config: QuantizeConfig | None = None,
    *,
    target_shift: torch.Tensor | None = None,
    grids: Grid | None = None,
    outputs: torch.Tensor | None = None,
    process_group: ProcessGroup | None = None,
    backend: SolverBackend | None = None,
) -> QuantizedWeight:
    """Quantizes one weight so that the layer's output on the calibration inputs changes least.

    Args:
        W: weight [out, in], any float dtype. Work is done in float32, or float64 if W is float64.
        H: Hessian XᵀX / n [in, in] of the layer's input (any constant factor cancels), or the result
            of `prepare_hessian` with the same settings.
        config: settings; `dynamic` is ignored here.
        target_shift: correction for the errors of earlier layers [out, in], as
            `core.drift.Drift.take_target_shift` returns it; overwritten.
        grids: fixed grids, `scale` and `zero` each [out, groups], instead of searched ones; the
            scales should be float16 values.
        outputs: B [out, out], what errors of two outputs cost together (any constant factor cancels);
            rows then compensate for each other's errors (`core.output_weighting`). None: rows are
            independent.
        process_group: with `outputs`, the processes that share the rows, all calling this alike.
            Without, rows are independent and the caller can share them.
        backend: loops over columns; None: chosen for this weight (`core.backends.dispatch`).

    Returns:
        Codes in the original channel order, with `relative_error` and the damping used.

    Raises:
        ConfigError: shapes that do not fit.
        SingularError: H is zero, or no damping makes it definite.
        NumericalError: NaN or infinity in W or H, or a scale does not fit float16.
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
    weighting = (
        None if outputs is None else OutputWeighting(outputs.to(dtype), W.shape[1], process_group)
    )
    targets = (
        None
        if target_shift is None
        else corrected_target(W, target_shift.to(dtype), H.order.perm, H.factor)
    )
    backend, spec = backend or choose_backend(H.factor.D), grid_spec(config)
    # Rows are taken in parts, so that all temporaries are small.
    step = max(1, workspace(W.device) // W.shape[1])
    parts, sums = [], torch.zeros(3, dtype=torch.float64)
    with _damped(H):
        for rows in row_parts(len(W), step) if weighting is None else weighting.row_blocks(step):
            part_W = W[rows].to(dtype)
            target = part_W if targets is None else targets[rows]
            T = target if weighting is None else target + weighting.feedback()
            part_grids = None if grids is None else Grid(grids.scale[rows], grids.zero[rows])
            q, loss = _solve_rows(T, H, config, spec, part_grids, backend)
            parts.append(q)
            Q = q.dequantize(dtype)
            if weighting is not None:
                weighting.record_errors(target - Q)
                if weighting.idle:
                    continue  # a dummy row
            E = part_W - Q
            if config.refine or T is not part_W:
                loss = H.factor.quadratic(permuted_columns(E, H.order.perm))
            squared_error = float(E.square().sum())
            # The loss is that of H, without the damping.
            loss = max(loss - H.factor.shift * squared_error, 0.0)
            sums += torch.tensor([loss, squared_error, float(part_W.square().sum())])
    if weighting is not None and process_group is not None:
        process_group.all_reduce_sum(sums)
    loss, squared_error, weight_energy = sums.tolist()
    energy = _energy(W, H.H)
    join = torch.cat if weighting is None else weighting.in_order
    codes, scales, zeros = (join([getattr(q, name) for q in parts]) for name in FIELDS_BY_ROW)
    return replace(
        parts[0],
        codes=codes,
        scales=scales,
        zeros=zeros,
        relative_error=_ratio(loss, energy),
        weight_error=_ratio(squared_error, weight_energy),
        energy=energy,
        weight_energy=weight_energy,
    )


def _solve_rows(
    T: torch.Tensor,
    H: PreparedHessian,
    config: QuantizeConfig,
    spec: GridSpec,
    grids: Grid | None,
    backend: SolverBackend,
) -> tuple[QuantizedWeight, float]:
    """Rounds and refines some rows of the target T; H.H is damped while this runs.

    Returns:
        The quantized rows, and the loss of rounding, before refinement.
    """
    order, keep_scales = H.order, grids is not None
    if grids is None and order.fixed_grids:
        size = config.columns_per_group(T.shape[1])
        grids = _original_grids(T, size, spec.error_weights(H.H.diagonal()), spec, backend)
    sweep = ColumnSweep(permuted_columns(T, order.perm), H.factor, order, spec, grids, backend)
    sweep.round_all()
    q = sweep.result()
    if config.refine:
        with timer.phase("refine"):
            q = refine(
                q, T, H.H, rounds=config.refine, moves=config.exchange, keep_scales=keep_scales,
                backend=backend,
            )  # fmt: skip
    return q, sweep.loss


def round_to_nearest(
    W: torch.Tensor,
    config: QuantizeConfig | None = None,
    *,
    weights: torch.Tensor | None = None,
    fallback: str | None = None,
) -> QuantizedWeight:
    """Rounds each weight to the nearest point of its group's grid, without a Hessian: the baseline.

    Args:
        W: weight [out, in].
        config: `bits`, `group_size`, `sym` and `format` are used, and `positive_scales` in a search.
        weights: [in], weights of squared errors in a search for the grids; None: min-max grids.
        fallback: the reason, recorded in the result, if this replaces `solve`.

    Raises:
        ConfigError: W is not a matrix.
        NumericalError: NaN or infinity in W, or a scale does not fit float16.
    """
    config = config or QuantizeConfig()
    W = _checked(W).to(torch.float64 if W.dtype == torch.float64 else torch.float32)
    size, spec = config.columns_per_group(W.shape[1]), grid_spec(config)
    grids = _original_grids(W, size, weights, spec, choose_backend(W))
    g_idx = torch.arange(W.shape[1], device=W.device) // size
    channel_grids = Grid(grids.scale[:, g_idx], grids.zero[:, g_idx])
    codes = encode(W, channel_grids, config.maxq)
    error, energy = (float(X.square().sum()) for X in (W - decode(codes, channel_grids), W))
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
    """Returns the number of entries of a weight that are solved at a time."""
    return ROW_WORKSPACE if device.type == "cpu" else ACCELERATOR_WORKSPACE


@contextmanager
def _damped(H: PreparedHessian) -> Iterator[None]:
    """Context manager: adds the damping to the diagonal of H.H; a damped copy would be as large as H."""
    diagonal = H.H.diagonal().clone()
    H.H.diagonal().add_(H.factor.shift)
    try:
        yield
    finally:
        H.H.diagonal().copy_(diagonal)


def _energy(W: torch.Tensor, H: torch.Tensor) -> float:
    """Returns tr(W H Wᵀ) for W [out, in]: the energy that errors are measured against.

    H is symmetric: each panel of it is read from the diagonal on, and counted twice except for the
    diagonal's block.
    """
    total = 0.0
    for rows in torch.split(W, ENERGY_ROWS):
        part = rows.to(H.dtype)
        for a in range(0, len(H), ENERGY_PANEL):
            b = min(a + ENERGY_PANEL, len(H))
            panel = H[a:, a:b].clone()
            panel[: b - a] /= 2
            products = matmul(part[:, a:], panel).mul_(part[:, a:b])
            total += 2 * float(products.sum(dtype=torch.float64))
    return total


def _original_grids(
    T: torch.Tensor,
    size: int,
    weights: torch.Tensor | None,
    spec: GridSpec,
    backend: SolverBackend,
) -> Grid:
    """Returns the grids of the original groups before any column is rounded, each [out, groups].

    Args:
        T: [out, in].
        size: columns of a group.
        weights: [in], weights of squared errors that a search minimises; None: min-max grids.
        spec: rules of the grids.
        backend: searches.
    """
    spec, grids = replace(spec, keep=1), []
    for start in range(0, T.shape[1], size):
        columns = slice(start, start + size)
        if weights is None:
            grid = minmax(T[:, columns], spec)
        else:
            best = backend.search_grids(T[:, columns].T, weights[columns], spec)
            grid = Grid(best.scale[0], best.zero[0])
        grids.append(grid)
    scales, zeros = zip(*grids, strict=True)
    return Grid(torch.stack(scales, dim=1), torch.stack(zeros, dim=1))


def _checked(W: torch.Tensor) -> torch.Tensor:
    """Returns W without its gradient; raises if it is not a finite matrix."""
    if W.ndim != 2 or not W.numel():
        raise ConfigError(f"W is {tuple(W.shape)}; a weight is [out, in]")
    W = W.detach()
    if not all_finite(W):
        raise NumericalError("NaN or infinity in the weight")
    return W


def _ratio(part: float, whole: float) -> float:
    """Returns part / whole, and 0 if there is no whole."""
    return part / whole if whole > 0 else 0.0
