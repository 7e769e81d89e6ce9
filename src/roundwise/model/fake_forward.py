"""Runs a model on fake tensors to find which linears it calls and which of them share an input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from roundwise.config import QuantizeConfig
from roundwise.model.build import build, forward_kwargs
from roundwise.model.expert_weights import replace_fused_experts
from roundwise.model.moe import dispatch_to_all
from roundwise.model.streamed import StreamedModel

#: What does not reach a block: text alone, or pictures and sounds.
UNREACHED = {False: "text alone", True: "the pictures or sounds of the calibration"}
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


def drop_uncalled_linears(
    streamed: StreamedModel,
    config: QuantizeConfig,
    media: Sequence[Mapping[str, torch.Tensor]] = (),
) -> CallTrace:
    """Skips the linears that the model never calls: it may use their weights in another way.

    Args:
        streamed: the model; `skipped_linears` of its blocks and `skipped_blocks` are updated.
        config: settings of the run; `experts` decides how experts share inputs.
        media: tokens and further inputs of some batches, one for each set of inputs: they show what the
            blocks of towers call; without them, text shows what all other blocks call.

    Returns:
        The calls; if they are empty, nothing is skipped.
    """
    batches: Sequence[Mapping[str, torch.Tensor] | None] = media or [None]
    traces = [trace_calls(streamed, config, inputs) for inputs in batches]
    calls = traces[0]
    called = set[str]().union(*(trace.first_reader for trace in traces))
    if not all(trace.first_reader for trace in traces):
        called = set()
    blocks = [block for block in streamed.blocks if called and block.is_tower == bool(media)]
    for block in blocks:
        called_linears = called & block.linears.keys()
        for name in [name for name in block.linears if name not in called_linears]:
            del block.linears[name]
            block.skipped_linears[name] = (
                "the model never calls it, but may read its weight"
                if called_linears
                else f"the model does not call its block for {UNREACHED[bool(media)]}"
            )
        repeated = frozenset[str]().union(*(trace.repeated_in_block for trace in traces))
        for name in [name for name in block.linears if name in repeated]:
            del block.linears[name]
            block.skipped_linears[name] = "its block calls it more than once, with other inputs"
    streamed.skip_blocks([block for block in blocks if not block.linears])
    return calls


class RealIntegers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes what depends on no fake tensor with values, and takes masks apart that choose from one.

    So sizes of pictures and places of their tokens are known inside a `FakeTensorMode`.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operation."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [*chain(*map(_positions, args[1]))], *args[2:])
        return func(*args, **(kwargs or {}))


def _positions(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Returns an index of a tensor as numbers, if it is a mask with values."""
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return (index,)
    with unset_fake_temporarily():
        return index.nonzero(as_tuple=True)


def trace_calls(
    streamed: StreamedModel,
    config: QuantizeConfig,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> CallTrace:
    """Runs a forward with fake weights through a second model on the meta device.

    Args:
        streamed: the model; it is not changed.
        config: settings of the run; with experts="all", all experts read the same tensor.
        inputs: tokens and further inputs, whose values the forward may need; None: `PROBE_TOKENS` fake
            tokens.

    Returns:
        The calls of the blocks' linears; empty if the forward fails without real values.
    """
    model = build(streamed.model.config, streamed.dtype)
    replace_fused_experts(model, streamed.expert_layout)
    for path in streamed.expert_layout:
        experts = model.get_submodule(path)
        experts.dispatch = partial(dispatch_to_all, experts, as_one=config.experts == "all")
    read: list[tuple[str, torch.Tensor]] = []  # holds the tensors, so that no storage is reused

    def hook(name: str) -> Any:
        return lambda _, args: read.append((name, args[0]))

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
            if inputs is None:
                model(**forward_kwargs(model, torch.zeros(1, PROBE_TOKENS, dtype=torch.int64)))
            else:
                with RealIntegers():  # type: ignore[no-untyped-call]
                    others = {name: x for name, x in inputs.items() if name != "input_ids"}
                    model(**forward_kwargs(model, inputs["input_ids"], None, others))
    except Exception:  # a forward that depends on values fails in many ways without them
        return CallTrace()
    reader_of: dict[tuple[int, int, int], str] = {}
    first_reader: dict[str, str] = {}
    for name, x in read:
        key = (x.untyped_storage()._cdata, x.numel(), x._version)
        first_reader.setdefault(name, reader_of.setdefault(key, name))
    counts = Counter(name for name, _ in read)
    return CallTrace(
        first_reader,
        tuple(name for name, count in counts.items() if count > 1),
        frozenset(name for (name, _), count in calls.items() if count > 1),
    )
