"""What a forward without data tells: which layers are called, and which of them read the same input."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from roundwise.config import QuantizeConfig
from roundwise.model.build import arguments, build
from roundwise.model.expert_weights import replace_fused_experts
from roundwise.model.moe import visit_all
from roundwise.model.streamed import StreamedModel

#: Tokens of the forward.
PROBE_TOKENS = 8


@dataclass(frozen=True)
class CallTrace:
    """What a forward without data called; nothing if it looks at its data."""

    first: dict[str, str] = field(default_factory=dict)
    """Layer -> the first that reads the same tensor."""
    repeated: tuple[str, ...] = ()
    """Layers that were called more than once."""


def drop_uncalled_linears(streamed: StreamedModel, config: QuantizeConfig) -> CallTrace:
    """Has linears stay that the model never calls: it may read their weights in another way."""
    calls = trace_calls(streamed, config)
    called = calls.first
    for block in streamed.blocks if called else []:
        reached = called.keys() & block.linears.keys()
        for name in [name for name in block.linears if name not in reached]:
            del block.linears[name]
            block.skipped_linears[name] = (
                "the model never calls it, but may read its weight"
                if reached
                else "the model does not call its block for text alone"
            )
    streamed.skip_blocks([block for block in streamed.blocks if called and not block.linears])
    return calls


def trace_calls(streamed: StreamedModel, config: QuantizeConfig) -> CallTrace:
    """Runs the forward."""
    model = build(streamed.model.config, streamed.dtype)
    replace_fused_experts(model, streamed.layout)
    for path in streamed.layout:
        experts = model.get_submodule(path)
        experts.visits = partial(visit_all, experts, as_one=config.experts == "all")
    seen: list[tuple[str, torch.Tensor]] = []  # tensors are kept, so that no identity comes again

    def hook(name: str) -> Any:
        return lambda _, args: seen.append((name, args[0]))

    for block in streamed.blocks:
        for name in block.linears:
            model.get_submodule(name).register_forward_pre_hook(hook(name))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            for module in model.modules():
                for key, weight in module._parameters.items():
                    if weight is not None:
                        fake = torch.empty(weight.shape, dtype=weight.dtype)
                        module._parameters[key] = nn.Parameter(fake, requires_grad=False)
                for key, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)
            model(**arguments(model, torch.zeros(1, PROBE_TOKENS, dtype=torch.int64)))
    except Exception:  # a forward that looks at its data, which fails in many ways without any
        return CallTrace()
    first: dict[tuple[int, int, int], str] = {}
    found: dict[str, str] = {}
    for name, x in seen:
        key = (x.untyped_storage()._cdata, x.numel(), x._version)
        leader = first.setdefault(key, name)
        found.setdefault(name, leader)
    counts = Counter(name for name, _ in seen)
    return CallTrace(found, tuple(name for name, count in counts.items() if count > 1))
