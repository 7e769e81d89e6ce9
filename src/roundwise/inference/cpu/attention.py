"""Attention for decoding on the CPU: one query token against all keys and values.

Query heads that share keys and values (grouped-query attention) are computed as the rows of one product.
torch's own way reads keys and values once per query head, in bfloat16 at a twentieth of the speed;
decoding then spends as long on attention as on all packed weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: Name of this implementation in transformers' registry.
NAME = "roundwise"
#: Arguments that only transformers' own function supports.
UNSUPPORTED = ("position_bias", "softcap", "cache", "output_attentions")


def attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention function for transformers: groups query heads if possible, else calls its `sdpa`.

    Groups them for one query on the CPU, without a mask, if query heads share keys and values.

    Args:
        module: the attention layer.
        query: [batch, heads, queries, width].
        key, value: [batch, groups, keys, width].
        attention_mask, dropout, scaling, kwargs: as transformers defines them.

    Returns:
        [batch, queries, heads, width], and None in place of attention weights.
    """
    batch, heads, queries, width = query.shape
    groups = key.shape[1]
    decoding = query.device.type == "cpu" and queries == 1 and attention_mask is None
    if not decoding or heads == groups or any(kwargs.get(name) for name in UNSUPPORTED):
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    rows = query.reshape(batch, groups, heads // groups, width)
    out = torch.nn.functional.scaled_dot_product_attention(
        rows, key, value, dropout_p=dropout, scale=scaling
    )
    return out.reshape(batch, 1, heads, value.shape[-1]), None


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Makes a model use `attention` if it uses transformers' `sdpa`; others are not changed."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
