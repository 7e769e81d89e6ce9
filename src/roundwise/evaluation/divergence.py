"""How far a quantized model's predictions are from the original's: KL divergence, top-1 agreement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from roundwise.errors import CalibrationError, NumericalError
from roundwise.system.half_matmul import cpu_half_matmul


@dataclass(frozen=True)
class Divergence:
    """Means over all positions of all windows, and perplexities of the same forward."""

    kl_divergence: float
    """KL(original || quantized) per token, in nats."""
    top1_agreement: float
    """Part of the positions where both put the same token first."""
    perplexity: tuple[float, float]
    """Original, quantized; every token of a window but the first is predicted."""
    tokens: int
    kl_by_position: list[float]
    """KL at each position of the window, mean over the windows."""


@torch.no_grad()
def divergence(
    base: Any,
    quantized: Any,
    ids: list[int],
    *,
    window: int = 512,
    batch_size: int = 4,
    progress: Callable[[float], None] | None = None,
) -> Divergence:
    """Compares two models of one vocabulary on windows without overlap, in float32.

    Args:
        base: the original model.
        quantized: the model made from it.
        ids: token ids; what is left after the last whole window is not used.
        window: tokens of a window.
        batch_size: windows that go through the models together.
        progress: called with the finished part, 0 … 1.

    Raises:
        CalibrationError: there is no whole window.
        NumericalError: an output is NaN or infinite.
    """
    count = len(ids) // window
    if count < 1 or window < 2:
        raise CalibrationError(f"{len(ids)} tokens make no window of {window}")
    windows = torch.tensor(ids[: count * window]).view(count, window)
    totals = torch.zeros(3, dtype=torch.float64)  # agreement, nll of base, nll of quantized
    kl_sums = torch.zeros(window, dtype=torch.float64)
    for start in range(0, count, batch_size):
        part = windows[start : start + batch_size].to(base.device)
        # One window at a time beyond the forward: log-probabilities of a large vocabulary are big.
        with cpu_half_matmul():
            outputs = [model(input_ids=part, use_cache=False).logits for model in (base, quantized)]
        for row, target in enumerate(part):
            p, q = (torch.log_softmax(logits[row].float(), dim=-1) for logits in outputs)
            kl_sums += (p.exp() * (p - q)).sum(dim=-1).double().cpu()
            broadcast_object = p.argmax(dim=-1) == q.argmax(dim=-1)
            nll = [-log[:-1].gather(1, target[1:, None]).double().sum() for log in (p, q)]
            totals += torch.stack([broadcast_object.double().sum(), *nll]).cpu()
        if progress is not None:
            progress(min(1.0, (start + len(part)) / count))
    if not bool(torch.isfinite(torch.cat([totals, kl_sums])).all()):
        raise NumericalError("the output of a model is NaN or infinite")
    positions, predicted = count * window, count * (window - 1)
    base_ppl, quantized_ppl = (totals[1:] / predicted).exp().tolist()
    return Divergence(
        float(kl_sums.sum()) / positions,
        float(totals[0]) / positions,
        (base_ppl, quantized_ppl),
        positions,
        (kl_sums / count).tolist(),
    )
