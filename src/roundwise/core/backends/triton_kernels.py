"""Triton programs of the solver: the inner loops of `core/backends/reference.py` on a GPU.

They do column by column what the plain version does, for tiles of rows (which are independent), with
everything that changes in registers. Rounding is half to even and division exact, as torch's. This file
needs triton; it is imported when the first weight is solved on a GPU.
"""

import triton
import triton.language as tl

#: As in `core/backends/reference.py`.
MIN_DISTANCE, MIN_GAIN = tl.constexpr(0.25), tl.constexpr(1e-4)


@triton.jit
def _nearest(x, low, high):
    """Returns the integer nearest to x from `low` to `high`, integers of less than 2^21 in size."""
    x = tl.minimum(tl.maximum(x, low), high)
    # Beyond 1.5 · 2^23 float32 has integers only, and adding rounds half to even.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _row(values, here):
    """Returns the row of `values` [n, R] that the mask `here` [n] marks."""
    return tl.sum(tl.where(here[:, None], values, 0.0), axis=0)


@triton.jit(do_not_specialize=["n", "rows", "maxq"])
def round_panel(
    U_ptr,
    T_ptr,
    t_ptr,
    scale_ptr,
    zero_ptr,
    codes_ptr,
    E_ptr,
    n,
    rows,
    maxq,
    U_stride,
    T_stride,
    t_stride,
    grid_stride,
    codes_stride,
    E_stride,
    N: tl.constexpr,
    R: tl.constexpr,
):
    """Rounds n <= N columns of a tile of R rows, one after another.

    In: U [n, n] unit upper triangular; target T [n, rows]; t [n, rows], T plus the feedback of finished
    columns; scale and zero, `rows` values for each column, or the same for all (`grid_stride` 0). Out:
    codes, E = T - value, and t as it was when its column was rounded.
    """
    r = tl.program_id(0) * R + tl.arange(0, R)
    k = tl.arange(0, N)
    live = r < rows
    inside = (k < n)[:, None] & live[None, :]
    t = tl.load(t_ptr + k[:, None] * t_stride + r[None, :], mask=inside, other=0.0)
    for j in range(n):
        scale = tl.load(scale_ptr + j * grid_stride + r, mask=live, other=1.0)
        zero = tl.load(zero_ptr + j * grid_stride + r, mask=live, other=0.0)
        value = _nearest(tl.div_rn(_row(t, k == j), scale), -zero, maxq - zero)
        target = tl.load(T_ptr + j * T_stride + r, mask=live, other=0.0)
        E = target - value * scale
        tl.store(codes_ptr + j * codes_stride + r, (value + zero).to(tl.uint8), mask=live)
        tl.store(E_ptr + j * E_stride + r, E, mask=live)
        u = tl.load(U_ptr + j * U_stride + k, mask=(k > j) & (k < n), other=0.0)
        t += u[:, None] * E[None, :]
    tl.store(t_ptr + k[:, None] * t_stride + r[None, :], t, mask=inside)


@triton.jit(do_not_specialize=["n", "rows", "maxq"])
def score_grids(
    W_ptr,
    D_ptr,
    scale_ptr,
    zero_ptr,
    score_ptr,
    n,
    rows,
    maxq,
    W_stride,
    N: tl.constexpr,
    R: tl.constexpr,
):
    """Computes what each candidate costs: Σ_j D_j (w_j - q_j)² for W [n, rows]; one program for each.

    scale, zero and score are [candidates, rows].
    """
    r = tl.program_id(0) * R + tl.arange(0, R)
    live = r < rows
    at = tl.program_id(1) * rows + r
    scale = tl.load(scale_ptr + at, mask=live, other=1.0)[None, :]
    zero = tl.load(zero_ptr + at, mask=live, other=0.0)[None, :]
    total = tl.zeros([R], tl.float32)
    for start in range(0, n, N):
        k = start + tl.arange(0, N)
        inside = (k < n)[:, None] & live[None, :]
        W = tl.load(W_ptr + k[:, None] * W_stride + r[None, :], mask=inside, other=0.0)
        D = tl.load(D_ptr + k, mask=k < n, other=0.0)
        error = (
            _nearest(tl.div_rn(W, tl.broadcast_to(scale, [N, R])), -zero, maxq - zero) * scale - W
        )
        total += tl.sum(D[:, None] * error * error, axis=0)
    tl.store(score_ptr + at, total, mask=live)


@triton.jit(do_not_specialize=["n", "rows", "maxq"])
def descend(
    H_ptr,
    G_ptr,
    scale_ptr,
    zero_ptr,
    index_ptr,
    codes_ptr,
    change_ptr,
    n,
    rows,
    maxq,
    H_stride,
    G_stride,
    N: tl.constexpr,
    R: tl.constexpr,
):
    """Moves the codes of n <= N columns of a tile of R rows to their best values, one after another.

    In: H [n, n]; G [n, rows]; scale and zero [groups, rows]; index [n], the group of each column. In and
    out: codes [n, rows]. Out: change [n, rows], by how much the values moved.
    """
    r = tl.program_id(0) * R + tl.arange(0, R)
    k = tl.arange(0, N)
    live = r < rows
    inside = (k < n)[:, None] & live[None, :]
    G = tl.load(G_ptr + k[:, None] * G_stride + r[None, :], mask=inside, other=0.0)
    for j in range(n):
        group = tl.load(index_ptr + j) * rows + r
        scale = tl.load(scale_ptr + group, mask=live, other=1.0)
        zero = tl.load(zero_ptr + group, mask=live, other=0.0)
        at = j * rows + r
        before = tl.load(codes_ptr + at, mask=live, other=0).to(tl.float32) - zero
        gradient = _row(G, k == j)
        diagonal = tl.load(H_ptr + j * H_stride + j)
        best = before * scale - tl.div_rn(gradient, tl.broadcast_to(diagonal, [R]))
        after = _nearest(tl.div_rn(best, scale), -zero, maxq - zero)
        change = (after - before) * scale
        tl.store(codes_ptr + at, (after + zero).to(tl.uint8), mask=live)
        tl.store(change_ptr + at, change, mask=live)
        h = tl.load(H_ptr + j * H_stride + k, mask=(k > j) & (k < n), other=0.0)
        G += h[:, None] * change[None, :]


@triton.jit
def _answers(
    free, low, gradient, step_cost, ratio, H_ptr, scale_ptr, index_ptr, k, inside, rows, maxq,
    H_stride, left,
):  # fmt: skip
    """Makes up to `left` moves, each the one of all `free` columns that gains most, until none gains.

    Returns by how many codes each column moved, the gradient afterwards, and the cost (below zero).
    """
    moved = tl.zeros_like(gradient)
    total = tl.sum(moved)
    while left > 0:
        wanted = gradient * ratio
        answer = _nearest(wanted, low - moved, low - moved + maxq)
        answer = tl.where(free, answer, 0.0)
        cost = (answer - 2.0 * wanted) * answer * step_cost
        least, j = tl.min(cost, axis=0, return_indices=True)
        left = tl.where(least < 0.0, left - 1, 0)
        if least < 0.0:
            total += least
            there = tl.where(k == j, answer, 0.0)
            moved += there
            delta = tl.sum(there) * tl.load(scale_ptr + tl.load(index_ptr + j) * rows)
            gradient += tl.load(H_ptr + j * H_stride + k, mask=inside, other=0.0) * delta
    return moved, gradient, total


@triton.jit(do_not_specialize=["n", "rows", "maxq", "moves"])
def exchange(
    H_ptr,
    G_ptr,
    scale_ptr,
    index_ptr,
    codes_ptr,
    change_ptr,
    n,
    rows,
    maxq,
    moves,
    H_stride,
    G_stride,
    N: tl.constexpr,
):
    """Moves each of n <= N codes of one row to its best, then up to `moves` together, from each one.

    Arguments as for `descend`. Each program has one row, so that it can skip moves that do not pay.
    """
    row = tl.program_id(0)
    k = tl.arange(0, N)
    inside = k < n
    group = tl.load(index_ptr + k, mask=inside, other=0)
    scale = tl.load(scale_ptr + group * rows + row, mask=inside, other=1.0)
    diagonal = tl.load(H_ptr + k * (H_stride + 1), mask=inside, other=1.0)
    step_cost = scale * scale * diagonal
    ratio = -tl.div_rn(tl.full([N], 1.0, tl.float32), scale * diagonal)
    gradient = tl.load(G_ptr + k * G_stride + row, mask=inside, other=0.0)
    code = tl.load(codes_ptr + k * rows + row, mask=inside, other=0).to(tl.float32)
    low = -code  # how far a column may still move down, in codes; up: low + maxq
    for i in range(n):
        here = k == i
        wanted = tl.sum(tl.where(here, gradient * ratio, 0.0))
        below = tl.sum(tl.where(here, low, 0.0))
        best = _nearest(wanted, below, below + maxq)
        if best != 0.0:
            step = tl.load(scale_ptr + tl.load(index_ptr + i) * rows + row)
            h = tl.load(H_ptr + i * H_stride + k, mask=inside, other=0.0)
            gradient += h * (best * step)
            low -= tl.where(here, best, 0.0)
    for i in range(n):
        here = k == i
        wanted = tl.sum(tl.where(here, gradient * ratio, 0.0))
        below = tl.sum(tl.where(here, low, 0.0))
        above = below + maxq
        first = _nearest(wanted, below, above)
        begins = (first != 0.0) | (tl.abs(wanted) >= MIN_DISTANCE)
        first = tl.where(first != 0.0, first, tl.where(wanted < 0.0, -1.0, 1.0))
        if begins & (first >= below) & (first <= above):
            step = tl.load(scale_ptr + tl.load(index_ptr + i) * rows + row)
            cost = step * step * tl.load(H_ptr + i * H_stride + i)
            h = tl.load(H_ptr + i * H_stride + k, mask=inside, other=0.0)
            # The first column must not move back.
            answers, tried, gain = _answers(
                inside & (k != i), low, gradient + h * (first * step), step_cost, ratio, H_ptr,
                scale_ptr + row, index_ptr, k, inside, rows, maxq, H_stride, moves - 1,
            )  # fmt: skip
            gain += (first - 2.0 * wanted) * first * cost
            if gain + cost * MIN_GAIN < 0.0:
                gradient = tried
                low -= tl.where(here, first, answers)
    at = k * rows + row
    code = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.float32)
    tl.store(change_ptr + at, (-low - code) * scale, mask=inside)
    tl.store(codes_ptr + at, (-low).to(tl.uint8), mask=inside)
