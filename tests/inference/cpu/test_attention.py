"""Grouped attention of one token equals transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import roundwise as rw
from roundwise.inference.cpu import attention as ours
from tests.helpers import windows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "groups", "queries", "masked"),
    [(8, 2, 1, False), (8, 1, 1, False), (4, 4, 1, False), (8, 2, 3, False), (8, 2, 1, True)],
)
def test_is_that_of_transformers(
    dtype: torch.dtype, heads: int, groups: int, queries: int, masked: bool
) -> None:
    module: Any = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    q = torch.randn(2, heads, queries, 16).to(dtype)
    k, v = (torch.randn(2, groups, 9, 16).to(dtype) for _ in range(2))
    mask = torch.rand(2, 1, queries, 9) < 0.7 if masked else None
    result, _ = ours.attention(module, q, k, v, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=0.3)
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)
    if dtype == torch.float32:
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_a_loaded_model_uses_it(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, _ = rw.load(quantized("llama"))
    assert model.config._attn_implementation == ours.NAME
    ids = torch.tensor(windows(seed=9)[:2])
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :-1]).past_key_values
        fast = []
        plain = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(
            torch.nn.functional, "scaled_dot_product_attention",
            lambda q, *a, **k: (fast.append(q.shape), plain(q, *a, **k))[1],
        )  # fmt: skip
        last = model(ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(last[:, -1], whole[:, -1], rtol=1e-3, atol=1e-3)
    assert fast == [(2, 2, 2, 16)] * 2  # four heads in two groups
    model.save_pretrained(tmp_path / "again")
    assert "roundwise" not in json.dumps(
        {k: v for k, v in json.loads((tmp_path / "again/config.json").read_text()).items()
         if k != "quantization_config"}
    )  # fmt: skip


def test_another_implementation_can_be_requested(quantized: Callable[..., Path]) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        quantized("llama"), attn_implementation="eager"
    )
    assert model.config._attn_implementation == "eager"
