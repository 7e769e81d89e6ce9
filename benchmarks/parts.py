"""Measures single parts of quantization: the solver, the Hessian, and a forward in half precision.

Run them with `python benchmarks/quantize.py --solver` (or `--hessian`, `--forward`).
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.environments import python_of
from transformers import AutoModelForCausalLM

import roundwise as rw
from roundwise.core.backends.dispatch import choose_backend
from roundwise.core.hessian import Hessian
from roundwise.core.linalg import permuted_columns
from roundwise.core.rounding import ColumnSweep
from roundwise.core.solver import grid_spec, prepare_hessian
from roundwise.system.half_matmul import cpu_half_matmul, has_native_matmul
from roundwise.system.hub import bundled_model

LENGTH = 512


def seconds(work: Callable[[], Any], repeat: int = 5) -> float:
    """Returns the median time of `work` after one warm-up run."""
    work()
    times = []
    for _ in range(repeat):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def published(W: torch.Tensor, H: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Quantizes as published (GPTQ, algorithm 1 with lazy batches of 128), column by column."""
    W, H, width, maxq = W.clone(), H.clone(), W.shape[1], 2**bits - 1
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q, zero = torch.zeros_like(W), (maxq + 1) // 2
    for a in range(0, width, 128):
        b = min(a + 128, width)
        block, errors = W[:, a:b].clone(), torch.zeros_like(W[:, a:b])
        for j in range(a, b):
            if j % group == 0:
                part = W[:, j : j + group]
                scale = 2 * part.abs().amax(dim=1, keepdim=True) / maxq
            w = block[:, j - a : j - a + 1]
            q = scale * (torch.clamp(torch.round(w / scale) + zero, 0, maxq) - zero)
            Q[:, j : j + 1] = q
            error = (w - q) / U[j, j]
            block[:, j - a :] -= error @ U[j : j + 1, j:b]
            errors[:, j - a : j - a + 1] = error
        W[:, b:] -= errors @ U[a:b, b:]
    return Q


def round_only(W: torch.Tensor, H: torch.Tensor, config: rw.QuantizeConfig) -> ColumnSweep:
    """Does what the published loop does, in our code: damping, factor, codes, scales and the loss."""
    prepared = prepare_hessian(H, config)
    columns = ColumnSweep(
        permuted_columns(W, prepared.order.perm), prepared.factor, prepared.order,
        grid_spec(config), None, choose_backend(W),
    )  # fmt: skip
    columns.round_all()
    return columns


def gptqmodel_seconds(width: int) -> float:
    """Returns the seconds of GPTQModel's solver for a layer of this width, in its own environment."""
    script = Path(__file__).parent / "peers" / "run_gptqmodel_solver.py"
    done = subprocess.run(
        [python_of("gptqmodel"), script, str(width), "3"],
        check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    return float(done.stdout)


def solver(*, against: bool) -> None:
    """Prints the solver's times: 4 bit, groups of 128, float32; rounding alone, and all of `rw.solve`.

    `rw.solve` also measures the relative error, which needs another product with the Hessian.
    """
    names = ["published", *(["GPTQModel"] if against else []), "rounding", "ratios"]
    names += ["solve, textbook", "solve, best", "loss ratio"]
    print(f"| layer | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    textbook, best = (rw.QuantizeConfig(recipe=recipe) for recipe in ("textbook", "best"))
    for width in (1024, 2048, 4096):
        X = torch.randn(2 * width, width) * torch.linspace(0.2, 3.0, width)
        X = X @ (torch.eye(width) + 0.3 * torch.randn(width, width) / width**0.5)
        H, W = X.T @ X / len(X), 0.02 * torch.randn(width, width)
        del X
        loop = seconds(lambda W=W, H=H: published(W, H, 4, 128), 1 if width > 2048 else 3)
        others = [loop, *([gptqmodel_seconds(width)] if against else [])]
        core = seconds(lambda W=W, H=H: round_only(W, H, textbook), 9)
        whole = [seconds(lambda W=W, H=H, c=c: rw.solve(W, H, c), 3) for c in (textbook, best)]
        E, P = W - rw.solve(W, H, textbook).dequantize(), W - published(W, H, 4, 128)
        ratio = float(((E @ H) * E).sum() / ((P @ H) * P).sum())
        print(
            f"| {width} x {width} | {' | '.join(f'{each:.2f} s' for each in others)} | {core:.4f} s "
            f"| **{', '.join(f'{each / core:.1f}x' for each in others)}** "
            f"| {whole[0]:.3f} s | {whole[1]:.3f} s | {ratio:.4f} |",
            flush=True,
        )


def hessian() -> None:
    """Compares sums over 4096 tokens: ours, and H *= n/(n+k); X *= √(2/n); H += XᵀX, as published."""
    print("| width | input | published | ours | ratio |\n|---|---|---|---|---|")
    for width in (1024, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            X, total = torch.randn(4096, width).to(dtype), torch.zeros(width, width)

            def accumulate(X: torch.Tensor = X, total: torch.Tensor = total) -> None:
                total *= 0.5
                rows = X.float() * 0.01
                total += rows.T @ rows

            ours = Hessian(width)
            loop, fast = seconds(accumulate), seconds(lambda X=X, ours=ours: ours.add(X))
            name = str(dtype).removeprefix("torch.")
            print(
                f"| {width} | {name} | {loop * 1e3:.0f} ms | {fast * 1e3:.0f} ms "
                f"| **{loop / fast:.2f}x** |",
                flush=True,
            )


def forward() -> None:
    """Prints the times of a half-precision forward of 8 x 512 tokens, as torch runs it and as we do."""
    model = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (8, LENGTH))

    def hidden() -> torch.Tensor:
        return model.model(input_ids=ids, use_cache=False).last_hidden_state.float()

    print("| type | native instructions | torch | roundwise | ratio |")
    print("|---|---|---|---|---|")
    with torch.no_grad():
        for dtype in (torch.float16, torch.bfloat16):
            model.to(dtype)
            plain = seconds(hidden, 3)
            with cpu_half_matmul():
                ours = seconds(hidden, 3)
            name = str(dtype).removeprefix("torch.")
            native = "yes" if has_native_matmul(dtype) else "no"
            print(f"| {name} | {native} | {plain:.2f} s | {ours:.2f} s | **{plain / ours:.1f}x** |")
