"""Norms, readers and writers of the residual stream are found by what they compute, not by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from roundwise.model.residual_trace import norm_kind, trace_residual_stream
from roundwise.model.streamed import open_streamed_model
from tests.helpers import LLAMA_GROUPS, QKV

#: Per architecture: norm -> linears behind it; linears that write.
SEQUENTIAL = (
    {"input_layernorm": QKV, "post_attention_layernorm": LLAMA_GROUPS[2]},
    ["self_attn.o_proj", "mlp.down_proj"],
)
ROLES: dict[str, tuple[dict[str, tuple[str, ...]], list[str]]] = {
    "llama": SEQUENTIAL,
    "qwen3": SEQUENTIAL,
    "mistral": SEQUENTIAL,
    # The output of each writer passes a norm, so the sum has no linear's output.
    "gemma3": (
        {"input_layernorm": QKV, "pre_feedforward_layernorm": LLAMA_GROUPS[2]},
        [],
    ),
    "gpt2": ({"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)}, ["attn.c_proj", "mlp.c_proj"]),
    # One norm, two branches, one sum.
    "falcon": (
        {"input_layernorm": ("self_attention.query_key_value", "mlp.dense_h_to_4h")},
        ["self_attention.dense", "mlp.dense_4h_to_h"],
    ),
    # Two norms of the same stream.
    "gpt_neox": (
        {
            "input_layernorm": ("attention.query_key_value",),
            "post_attention_layernorm": ("mlp.dense_h_to_4h",),
        },
        ["attention.dense", "mlp.dense_4h_to_h"],
    ),
}


@pytest.mark.parametrize("name", ROLES)
def test_norms_readers_and_writers(name: str, folder_of: Callable[[str], Path]) -> None:
    streamed = open_streamed_model(folder_of(name), dtype=torch.float32)
    norms, writers = ROLES[name]
    trace = trace_residual_stream(streamed)
    assert len(trace.blocks) == len(streamed.blocks)
    for block, call in zip(streamed.blocks, trace.blocks, strict=True):
        readers = {norm.name: norm.readers for norm in call.norms if norm.reads_stream}
        expected = {
            f"{block.name}.{norm}": tuple(f"{block.name}.{x}" for x in linears)
            for norm, linears in norms.items()
        }
        if name == "gemma3":  # the second norm's input is not a sum of linears' outputs
            expected = {k: v for k, v in expected.items() if "input_layernorm" in k}
        assert readers == expected
        assert call.writers == [f"{block.name}.{x}" for x in writers]
    assert trace.final_norm is not None
    assert len(trace.final_norm.readers) == 1


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: transformers.models.llama.modeling_llama.LlamaRMSNorm(16), (False, 0.0)),
        (lambda: transformers.models.gemma.modeling_gemma.GemmaRMSNorm(16), (False, 1.0)),
        (lambda: nn.LayerNorm(16), (True, 0.0)),
        (lambda: nn.LayerNorm(16, bias=False), (True, 0.0)),
        (lambda: nn.LayerNorm(16, elementwise_affine=False), None),
        (lambda: nn.BatchNorm1d(16).eval(), None),
        (lambda: nn.PReLU(16), None),
        (lambda: nn.RMSNorm(8), None),
    ],
    ids=["rms", "one plus", "layer", "no bias", "no gain", "batch", "prelu", "other width"],
)
def test_norms_are_recognised_by_their_output(
    make: Callable[[], nn.Module], kind: tuple[bool, float] | None
) -> None:
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        assert norm_kind(module, 16) == kind


def test_the_forward_leaves_one_block_in_memory(llama: Path) -> None:
    streamed = open_streamed_model(llama, dtype=torch.float32)
    trace_residual_stream(streamed)
    for block in streamed.blocks:
        assert all(p.device.type == "meta" for p in block.module.parameters())
    assert len(streamed.model.lm_head.weight) == 8
