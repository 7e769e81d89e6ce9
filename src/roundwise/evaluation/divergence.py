"""KL divergence and top-1 agreement between the predictions of a quantized model and its original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from roundwise.calibration.special_tokens import NO_SPECIAL_TOKENS, SpecialTokens
from roundwise.errors import CalibrationError, NumericalError
from roundwise.system.half_matmul import cpu_half_matmul


@dataclass(frozen=True)
class Divergence:
    """Averages over all positions of all windows, and perplexities on the same windows."""

    kl_divergence: float
    """KL(original || quantized) per token, in nats."""
    top1_agreement: float
    """Share of positions, 0 … 1, where both models predict the same token."""
    perplexity: tuple[float, float]
    """Perplexity of the original and the quantized model, over all tokens of a window but the first;
    that one too if special tokens stand in front of it."""
    tokens: int
    """Number of positions; those of special tokens are not among them."""
    kl_by_position: list[float]
    """KL at each position of the window, averaged over the windows."""


@torch.no_grad()
def divergence(
    base: Any,
    quantized: Any,
    ids: list[int],
    *,
    window: int = 512,
    batch_size: int = 4,
    special: SpecialTokens = NO_SPECIAL_TOKENS,
    progress: Callable[[float], None] | None = None,
) -> Divergence:
    """Compares the predictions of two models with the same vocabulary.

    Runs both on consecutive windows; with p and q the distributions that the original and the quantized
    model predict after a token of the text, in float32:

        KL(p || q) = Σ p (log p - log q)

    Args:
        base: original model.
        quantized: model made from it.
        ids: token ids; tokens after the last whole window are not used.
        window: tokens of a window, special ones included.
        batch_size: windows in one forward.
        special: special tokens around every window.
        progress: called with the finished part, 0 … 1.

    Raises:
        CalibrationError: there is no whole window, or a window has fewer than two tokens.
        NumericalError: an output is NaN or infinite.
    """
    size = window - special.count
    count = len(ids) // max(size, 1)
    if count < 1 or size < 2:
        raise CalibrationError(f"{len(ids)} tokens are too few for a window of {window}")
    begin = len(special.prefix)
    first = max(begin, 1)  # the first token with something in front of it
    windows = torch.tensor([special.around(ids[i * size : (i + 1) * size]) for i in range(count)])
    totals = torch.zeros(3, dtype=torch.float64)  # agreements, then negative log-likelihoods
    kl_sums = torch.zeros(size, dtype=torch.float64)
    for start in range(0, count, batch_size):
        batch = windows[start : start + batch_size].to(base.device)
        # After the forward, one window at a time: log-probabilities of a large vocabulary need memory.
        with cpu_half_matmul():
            outputs = [
                model(input_ids=batch, use_cache=False).logits for model in (base, quantized)
            ]
        for row, target in enumerate(batch):
            p, q = (torch.log_softmax(logits[row].float(), dim=-1) for logits in outputs)
            on_text = slice(begin, begin + size)
            kl_sums += (p[on_text].exp() * (p - q)[on_text]).sum(dim=-1).double().cpu()
            agreements = p[on_text].argmax(dim=-1) == q[on_text].argmax(dim=-1)
            # Position i predicts token i + 1.
            known = target[first : begin + size, None]
            nll = [
                -log[first - 1 : begin + size - 1].gather(1, known).double().sum() for log in (p, q)
            ]
            totals += torch.stack([agreements.double().sum(), *nll]).cpu()
        if progress is not None:
            progress(min(1.0, (start + len(batch)) / count))
    if not bool(torch.isfinite(torch.cat([totals, kl_sums])).all()):
        raise NumericalError("the output of a model is NaN or infinite")
    positions, predicted = count * size, count * (begin + size - first)
    base_ppl, quantized_ppl = (totals[1:] / predicted).exp().tolist()
    return Divergence(
        kl_divergence=float(kl_sums.sum()) / positions,
        top1_agreement=float(totals[0]) / positions,
        perplexity=(base_ppl, quantized_ppl),
        tokens=positions,
        kl_by_position=(kl_sums / count).tolist(),
    )
