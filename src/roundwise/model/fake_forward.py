"""Runs a model on fake tensors to find which linears it calls and which of them share an input."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from roundwise.config import QuantizeConfig
from roundwise.model.build import build, forward_kwargs
from roundwise.model.expert_weights import replace_fused_experts
from roundwise.model.moe import dispatch_to_all
from roundwise.model.streamed import StreamedModel

#: Tokens of the fake input.
PROBE_TOKENS = 8


@dataclass(frozen=True)
class CallTrace:
    """Calls of linears in a fake forward; empty if the model's forward depends on values."""

    first_reader: dict[str, str] = field(default_factory=dict)
    """Each called layer -> the first layer that reads the same tensor."""
    repeated: tuple[str, ...] = ()
    """Layers that were called more than once."""
    repeated_in_block: frozenset[str] = frozenset()
    """Layers that were called more than once in one call of their block."""


def drop_uncalled_linears(streamed: StreamedModel, config: QuantizeConfig) -> CallTrace:
    """Skips the linears that the model never calls: it may use their weights in another way.

    Args:
        streamed: the model; `skipped_linears` of its blocks and `skipped_blocks` are updated.
        config: settings of the run; `experts` decides how experts share inputs.

    Returns:
        The calls; if they are empty, nothing is skipped.
    """
    calls = trace_calls(streamed, config)
    called = calls.first_reader
    blocks = [block for block in streamed.blocks if called and not block.is_tower]
    for block in blocks:
        called_linears = called.keys() & block.linears.keys()
        for name in [name for name in block.linears if name not in called_linears]:
            del block.linears[name]
            block.skipped_linears[name] = (
                "the model never calls it, but may read its weight"
                if called_linears
                else "the model does not call its block for text alone"
            )
        for name in [name for name in block.linears if name in calls.repeated_in_block]:
            del block.linears[name]
            block.skipped_linears[name] = "its block calls it more than once, with other inputs"
    streamed.skip_blocks([block for block in blocks if not block.linears])
    return calls


def trace_calls(streamed: StreamedModel, config: QuantizeConfig) -> CallTrace:
    """Runs a forward of `PROBE_TOKENS` fake tokens through a second model on the meta device.

    Args:
        streamed: the model; it is not changed.
        config: settings of the run; with experts="all", all experts read the same tensor.

    Returns:
        The calls of the blocks' linears; empty if the forward fails without real values.
    """
    model = build(streamed.model.config, streamed.dtype)
    replace_fused_experts(model, streamed.expert_layout)
    for path in streamed.expert_layout:
        experts = model.get_submodule(path)
        experts.dispatch = partial(dispatch_to_all, experts, as_one=config.experts == "all")
    inputs: list[tuple[str, torch.Tensor]] = []  # holds the tensors, so that no storage is reused

    def hook(name: str) -> Any:
        return lambda _, args: inputs.append((name, args[0]))

    calls: Counter[tuple[str, int]] = Counter()  # by linear and call of its block
    for block in streamed.blocks:
        entries: list[None] = []
        module = model.get_submodule(block.name)
        module.register_forward_pre_hook(lambda *_, entries=entries: entries.append(None))
        for name in block.linears:
            linear = model.get_submodule(name)
            linear.register_forward_pre_hook(hook(name))
            linear.register_forward_pre_hook(
                lambda *_, name=name, entries=entries: calls.update([(name, len(entries))])
            )
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
            model(**forward_kwargs(model, torch.zeros(1, PROBE_TOKENS, dtype=torch.int64)))
    except Exception:  # a forward that depends on values fails in many ways without them
        return CallTrace()
    reader_of: dict[tuple[int, int, int], str] = {}
    first_reader: dict[str, str] = {}
    for name, x in inputs:
        key = (x.untyped_storage()._cdata, x.numel(), x._version)
        first_reader.setdefault(name, reader_of.setdefault(key, name))
    counts = Counter(name for name, _ in inputs)
    return CallTrace(
        first_reader,
        tuple(name for name, count in counts.items() if count > 1),
        frozenset(name for (name, _), count in calls.items() if count > 1),
    )
