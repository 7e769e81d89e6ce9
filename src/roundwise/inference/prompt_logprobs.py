"""Log probabilities of the tokens of a text, as a language model predicts them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from roundwise.errors import NumericalError
from roundwise.inference.sampling import TokenLogprobs

#: Tokens whose logits are in memory at the same time: a vocabulary can have 250,000 entries.
CHUNK = 256


@torch.no_grad()
def prompt_logprobs(
    model: Any,
    ids: list[int],
    count: int,
    text_of: Callable[[int], str],
    cancelled: Callable[[], bool] = lambda: False,
) -> list[TokenLogprobs]:
    """Returns the log probability of each token, given those before it.

    Args:
        model: transformers causal language model.
        ids: token ids; the first one has no log probability.
        count: number of most likely tokens at each place.
        text_of: decodes a token.
        cancelled: called after each part; the result ends when it returns True.

    Raises:
        NumericalError: the model computed NaN or infinity.
    """
    entries = [TokenLogprobs(text_of(ids[0]), None)]
    inputs = torch.tensor([ids], device=model.device)
    # Models without a cache of keys and values are computed at once.
    chunked = len(ids) > CHUNK and model._supports_default_dynamic_cache()
    cache = DynamicCache(config=model.config) if chunked else None
    for begin in range(0, len(ids) - 1, CHUNK if chunked else len(ids)):
        end = begin + CHUNK if chunked else len(ids)
        options = {"past_key_values": cache, "use_cache": True} if chunked else {"use_cache": False}
        logits = model(input_ids=inputs[:, begin:end], **options).logits[0]
        for row, token in zip(logits, ids[begin + 1 : end + 1], strict=False):
            if not bool((row < math.inf).all()):
                raise NumericalError("the model computed NaN or infinity")
            logprobs = row.double().log_softmax(dim=-1).cpu()
            entries.append(TokenLogprobs.of(logprobs, token, count, text_of))
        if cancelled():
            break
    return entries
