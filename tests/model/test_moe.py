"""Experts as separate linears compute what the fused ones of transformers do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from roundwise.model.moe import (
    BatchedExperts,
    LinearExperts,
    ProjectionNames,
    dispatch_to_all,
    expert_count,
    expert_roles,
    is_fused_experts,
    parse_expert_name,
    projection_shape,
    separate_experts,
)
from roundwise.model.streamed import open_streamed_model
from tests.helpers import random_model, windows
from tests.mixtures import MIXTURES

NAMES = pytest.mark.parametrize("name", MIXTURES)


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("model.layers.0.mlp.experts.3.up_proj", ("model.layers.0.mlp.experts", (3, "up_proj"))),
        ("a.experts.12.w2", ("a.experts", (12, "w2"))),
        ("model.layers.0.mlp.up_proj", None),
        ("model.layers.0.self_attn", None),
        ("experts.3.bias", None),
    ],
)
def test_names_of_an_experts_layer(name: str, parsed: Any) -> None:
    assert parse_expert_name(name) == parsed


def test_experts_that_are_multiplied_all_at_once() -> None:
    """Llama 4: the original forward is kept, its batched products call the experts' layers."""
    config = transformers.Llama4TextConfig(
        hidden_size=32, intermediate_size=48, num_local_experts=3
    )
    original = Llama4TextExperts(config)
    generator = torch.Generator().manual_seed(0)
    layers: dict[tuple[int, str], nn.Module] = {}
    with torch.no_grad():
        for weight in original.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    for expert in range(3):
        gate, up = original.gate_up_proj[expert].T.chunk(2)
        down = original.down_proj[expert].T
        for name, W in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
            layer.weight = nn.Parameter(W.contiguous())
            layers[expert, name] = layer
    assert is_fused_experts(original)
    separate = separate_experts(original, layers)
    assert isinstance(separate, BatchedExperts)
    assert [*separate.state_dict()][:3] == [
        f"0.{name}_proj.weight" for name in ("gate", "up", "down")
    ]
    x = torch.randn(3 * 5, 32, generator=generator)
    torch.testing.assert_close(separate(x), original(x))
    read: list[torch.Tensor] = []
    for name in ("gate_proj", "up_proj"):
        layers[1, name].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    separate(x)
    assert read[0] is read[1]  # so that both share a Hessian
    with pytest.raises(TypeError, match="separate layers"):
        torch.matmul(x, separate.down_proj)


def test_projections_have_a_name_for_each_role() -> None:
    names = ProjectionNames(gate="w1", down="w2")
    assert [names.of_role(role) for role in ("gate", "up", "down")] == ["w1", "up_proj", "w2"]


@NAMES
def test_fused_experts_are_recognised_and_measured(name: str) -> None:
    model = random_model(MIXTURES[name].config())
    fused = model.get_submodule(MIXTURES[name].experts)
    assert is_fused_experts(fused)
    assert not is_fused_experts(model)
    assert expert_count(fused) == 4
    gated = name != "nemotron_h"
    assert expert_roles(fused) == (("gate", "up", "down") if gated else ("up", "down"))
    inner, hidden = projection_shape(fused, "up")
    assert hidden == 64
    assert projection_shape(fused, "down") == (hidden, inner)
    assert inner == (32 if "_moe" in name or "v3" in name or not gated else 96)


def linear_experts(name: str, folder_of: Callable[[str], Path]) -> tuple[LinearExperts, Any]:
    """The first experts of a model as linears, and transformers' own module."""
    streamed = open_streamed_model(folder_of(name))
    path = MIXTURES[name].experts
    experts = streamed.model.get_submodule(path)
    assert isinstance(experts, LinearExperts)
    streamed.load(experts, path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder_of(name), experts_implementation="eager"
    )
    return experts, plain.get_submodule(path)


@NAMES
def test_the_output_is_that_of_the_fused_module(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    experts, fused = linear_experts(name, folder_of)
    x = torch.randn(10, 64)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(10)])
    weights = torch.rand(10, 2)
    with torch.no_grad():
        expected = fused(x, index, weights)
        torch.testing.assert_close(experts(x, index, weights), expected, rtol=1e-4, atol=1e-5)
        # Tokens that the router did not choose for an expert do not count.
        for as_one in (True, False):
            experts.dispatch = partial(dispatch_to_all, experts, as_one=as_one)
            torch.testing.assert_close(experts(x, index, weights), expected, rtol=1e-4, atol=1e-5)


def test_without_a_choice_there_is_no_output(folder_of: Callable[[str], Path]) -> None:
    experts, _ = linear_experts("qwen3_moe", folder_of)
    index = torch.full((3, 2), experts.count)  # the index behind the last: no expert
    with torch.no_grad():
        assert not experts(torch.randn(3, 64), index, torch.ones(3, 2)).any()


def test_each_expert_gets_its_tokens_or_all(folder_of: Callable[[str], Path]) -> None:
    experts, _ = linear_experts("qwen3_moe", folder_of)
    index = torch.tensor([[0, 3], [3, 1], [1, 0]])
    x = torch.randn(3, 64)
    dispatched = [(expert, rows.tolist()) for expert, rows in experts.dispatch_by_router(x, index)]
    assert dispatched == [(0, [0, 2]), (1, [1, 2]), (3, [0, 1])]
    assert list(dispatch_to_all(experts, x, index, as_one=True)) == [(e, None) for e in range(4)]
    every = [(e, rows.tolist()) for e, rows in dispatch_to_all(experts, x, index, as_one=False)]
    assert every == [(e, [0, 1, 2]) for e in range(4)]


def test_layers_are_in_order_of_experts_and_roles(folder_of: Callable[[str], Path]) -> None:
    experts, _ = linear_experts("mixtral", folder_of)
    linears = [name for name, m in experts.named_modules() if isinstance(m, nn.Linear)]
    assert linears == [f"{expert}.{name}" for expert in range(4) for name in ("w1", "w3", "w2")]
    assert experts.layer(2, "down") is experts.get_submodule("2.w2")


@NAMES
def test_experts_as_linears_compute_what_transformers_computes(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder_of(name), experts_implementation="eager"
    ).eval()
    ids = torch.tensor(windows())
    streamed = open_streamed_model(folder_of(name))
    streamed.load(streamed.model, "")
    assert any(isinstance(module, LinearExperts) for module in streamed.model.modules())
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, use_cache=False).logits for m in (streamed.model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
