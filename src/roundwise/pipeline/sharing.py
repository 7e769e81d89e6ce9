"""What a forward without data tells: which layers are called, and which of them read the same input."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from roundwise.config import QuantizeConfig
from roundwise.models.architecture import arguments, build
from roundwise.models.skeleton import Skeleton
from roundwise.models.split import open_up
from roundwise.pipeline.routing import Policy

#: Tokens of the forward.
PROBE_TOKENS = 8


def leave_uncalled(skeleton: Skeleton, config: QuantizeConfig) -> dict[str, str]:
    """Has linears stay that the model never calls: it may read their weights in another way.

    Returns:
        What `first_readers` does; if that is nothing, no linear is known not to be called.
    """
    called = first_readers(skeleton, config)
    for block in skeleton.blocks if called else []:
        reached = called.keys() & block.linears.keys()
        for name in [name for name in block.linears if name not in reached]:
            del block.linears[name]
            block.left[name] = (
                "the model never calls it, but may read its weight"
                if reached
                else "the model does not call its block for text alone"
            )
    skeleton.set_aside([block for block in skeleton.blocks if called and not block.linears])
    return called


def first_readers(skeleton: Skeleton, config: QuantizeConfig) -> dict[str, str]:
    """Layer -> the first that reads the same tensor, from a forward without data; {}: not known."""
    model = build(skeleton.model.config, skeleton.dtype)
    open_up(model, skeleton.layout)
    policy = Policy(config.experts)
    for path in skeleton.layout:
        experts = model.get_submodule(path)
        experts.visits = lambda x, _, experts=experts: policy.everyone(experts, x)
    seen: list[tuple[str, torch.Tensor]] = []  # tensors are kept, so that no identity comes again

    def hook(name: str) -> Any:
        return lambda _, args: seen.append((name, args[0]))

    for block in skeleton.blocks:
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
        return {}
    first: dict[tuple[int, int, int], str] = {}
    found = {}
    for name, x in seen:
        key = (x.untyped_storage()._cdata, x.numel(), x._version)
        found[name] = first.setdefault(key, name)
    return found
