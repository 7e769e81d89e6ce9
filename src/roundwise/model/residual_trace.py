"""Traces one small forward to find which linears read the residual stream, and which write to it.

No knowledge of the architecture is needed. A few tokens run through the model in float32, with one block
in memory at a time, and the recorded inputs and outputs of its modules identify

    a norm     a module with one number per channel that computes the same as RMSNorm or LayerNorm
    a reader   a linear layer whose input is the output of a norm whose input is the stream
    a writer   a linear layer whose output is a term of the sum that the block adds to the stream

Readers and writers are candidates: `rotate.check_equivalent` checks that the transformed model computes
the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from roundwise.errors import ConfigError
from roundwise.model.blocks import Block, output_head_name, wrapped_forwards
from roundwise.model.build import embedding_shape, forward_kwargs
from roundwise.model.foreign_errors import foreign_errors
from roundwise.model.streamed import StreamedModel

#: Tokens of the traced forward.
TOKENS = 8
#: Relative distance up to which two float32 results count as equal.
TOLERANCE = 1e-4
#: Terms of a sum whose factor is smaller are ignored.
NEGLIGIBLE = 1e-3


class NormKind(NamedTuple):
    """Formula of a norm: y = n(x) · (weight + offset) + bias."""

    centred: bool
    """n(x) subtracts the mean of x, as LayerNorm does."""
    offset: float
    """1 for models that store gains minus one, else 0."""


@dataclass(frozen=True)
class Norm:
    """A norm whose output linears read: y = n(x) · (weight + offset) + bias."""

    name: str
    readers: tuple[str, ...]
    """Names of the linears that read its output."""
    centred: bool
    """n(x) subtracts the mean of x, as LayerNorm does."""
    offset: float
    """1 for models that store gains minus one, else 0."""
    reads_stream: bool
    """x is the residual stream, not an intermediate result of a block."""


@dataclass
class BlockCall:
    """The call of a block: its arguments, its input and output, and the modules that it used."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: torch.Tensor
    """The residual stream before the block, [1, tokens, hidden]."""
    y: torch.Tensor
    """The residual stream after the block, [1, tokens, hidden]."""
    norms: list[Norm]
    writers: list[str]
    """Names of the linears whose outputs add up to y - x; none if the sum has other terms."""


@dataclass
class ModuleCall:
    """The call of a module without children: copies of its input x and its output y."""

    name: str
    module: nn.Module
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class ResidualTrace:
    """Record of one forward: the residual stream and the modules that read and write it."""

    width: int
    """Channels of the residual stream."""
    blocks: list[BlockCall] = field(default_factory=list)
    final_norm: Norm | None = None
    """The norm in front of the output head."""
    logits: torch.Tensor | None = None
    """Logits of the vocabulary rows that were loaded, [1, tokens, rows]."""


def trace_residual_stream(streamed: StreamedModel) -> ResidualTrace:
    """Runs `TOKENS` tokens through the model and records norms, readers and writers of each block.

    Args:
        streamed: the model, computing in float32 (`open_streamed_model(…, dtype=torch.float32)`); its
            embedding and head hold only a few rows afterwards, so it cannot be used again.

    Raises:
        ConfigError: the blocks do not pass hidden states to each other, or are not called once each.
    """
    model, head = streamed.model, output_head_name(streamed.model)
    trace = ResidualTrace(embedding_shape(model)[1])
    inside = {id(module) for block in streamed.blocks for module in block.module.modules()}
    outside = {name: m for name, m in model.named_modules() if id(m) not in inside}

    def wrap(block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
        def traced_forward(*args: Any, **kwargs: Any) -> Any:
            streamed.load(block.module, block.name)
            with _record_calls(dict(block.module.named_modules(prefix=block.name))) as calls:
                output = forward(*args, **kwargs)
            x = hidden_states_of(args, kwargs)
            y = output[0] if isinstance(output, tuple) else output
            if x is None or x.shape[-1] != trace.width or y.shape != x.shape:
                raise ConfigError(f"{block.name} does not pass hidden states from block to block")
            norms = list(_find_norms(calls, x))
            writers = _find_writers(calls, x, y, norms)
            trace.blocks.append(BlockCall(args, kwargs, x, y, norms, writers))
            streamed.unload(block.module, block.name)
            return output

        return traced_forward

    with _record_calls(outside) as calls:
        trace.logits = run_forward(streamed, wrap)
    if len(trace.blocks) != len(streamed.blocks):
        raise ConfigError("it does not call each of its blocks once")
    for norm in _find_norms(calls, trace.blocks[-1].y):
        if norm.reads_stream and norm.readers == (head,):
            trace.final_norm = norm
    return trace


def hidden_states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Returns the hidden states among a block's arguments; None if there are none."""
    x = args[0] if args else kwargs.get("hidden_states")
    return x if isinstance(x, torch.Tensor) else None


@torch.no_grad()
def run_forward(
    streamed: StreamedModel, wrap: Callable[[Block, Callable[..., Any]], Callable[..., Any]]
) -> torch.Tensor:
    """Runs `TOKENS` tokens through the model with a wrapper around each block's forward.

    Of the embedding and the head only `TOKENS` rows are loaded, from the middle of the vocabulary: they
    are the largest tensors, and any rows serve.

    Args:
        streamed: the model; everything outside its blocks is loaded.
        wrap: returns the replacement for a block's forward, which must load the block's weights.

    Returns:
        Logits of the loaded rows, [1, tokens, rows].
    """
    model, head = streamed.model, streamed.model.get_output_embeddings()
    tables = [module for module in (model.get_input_embeddings(), head) if module is not None]
    names = {block.name for block in streamed.blocks}
    for path, module in model.named_modules():
        if any(module is table for table in tables):
            _load_middle_rows(streamed, module, path)
        elif not any(path == name or path.startswith(f"{name}.") for name in names):
            streamed.load(module, path, recurse=False)
    count = len(tables[0].weight)
    with (
        wrapped_forwards(streamed.blocks, lambda _, block, forward: wrap(block, forward)),
        foreign_errors(f"{type(model).__name__} fails in its forward"),
    ):
        output = model(**forward_kwargs(model, torch.arange(count)[None]))
    logits = output.logits
    assert isinstance(logits, torch.Tensor)
    return logits


def _load_middle_rows(streamed: StreamedModel, module: nn.Module, path: str) -> None:
    """Loads `TOKENS` rows of each parameter of a module, from the middle."""
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            info = streamed.checkpoint.tensors[streamed.checkpoint_name_of[f"{path}.{name}"]]
            count = min(TOKENS, info.shape[0])
            rows = info.rows((info.shape[0] - count) // 2, count).read().to(streamed.dtype)
            module._parameters[name] = nn.Parameter(rows, requires_grad=False)


@contextmanager
def _record_calls(modules: dict[str, nn.Module]) -> Iterator[list[ModuleCall]]:
    """Context manager: a list to which each call of a module without children is appended."""
    calls: list[ModuleCall] = []

    def recording_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                calls.append(ModuleCall(name, module, args[0].clone(), output.clone()))

        return hook

    hooks = [
        module.register_forward_hook(recording_hook(name))
        for name, module in modules.items()
        if not any(True for _ in module.children())
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _find_norms(calls: list[ModuleCall], stream: torch.Tensor) -> Iterator[Norm]:
    """Yields the norms among the called modules whose output linears read, in call order.

    Args:
        calls: calls of modules whose weights are still loaded.
        stream: the residual stream before the calls.
    """
    for index, call in enumerate(calls):
        if _is_linear(call.module) or call.y.shape != call.x.shape:
            continue
        readers = [
            later.name
            for later in calls[index:]
            if _is_linear(later.module)
            and later.x.numel() == call.y.numel()
            and torch.equal(later.x.reshape(call.y.shape), call.y)
        ]
        kind = norm_kind(call.module, call.x.shape[-1]) if readers else None
        if kind is not None:
            earlier = [c.y for c in calls[:index] if _is_linear(c.module)]
            reads_stream = _is_residual_stream(call.x, stream, earlier)
            yield Norm(call.name, tuple(readers), kind.centred, kind.offset, reads_stream)


def _is_residual_stream(
    x: torch.Tensor, block_input: torch.Tensor, outputs: list[torch.Tensor]
) -> bool:
    """Tells whether x is the block's input plus multiples of some linears' outputs."""
    if not _same_size(x, block_input):
        return False
    terms = [y for y in outputs if _same_size(y, x)]
    return _fit_sum(x.reshape(block_input.shape) - block_input, terms) is not None


def _same_size(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tells whether both have as many tokens and channels; some models flatten the token axes."""
    return a.numel() == b.numel() and a.shape[-1] == b.shape[-1]


def norm_kind(module: nn.Module, width: int) -> NormKind | None:
    """Tests whether a module normalises its input and scales each channel.

    The module is applied to random rows, so large that epsilon does not matter.

    Args:
        module: any module with loaded weights.
        width: number of channels.

    Returns:
        The kind of the norm; None: the module computes something else.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, torch.Tensor) or weight.shape != (width,):
        return None
    generator = torch.Generator().manual_seed(0)
    x = 1000 * (torch.randn(16, width, generator=generator) + 0.5)
    y = module(x)
    b = bias if isinstance(bias, torch.Tensor) else torch.zeros(width)
    for centred in (False, True):
        shifted = x - x.mean(dim=-1, keepdim=True) if centred else x
        normed = shifted / shifted.square().mean(dim=-1, keepdim=True).sqrt()
        for offset in (0.0, 1.0):
            if is_close(y, normed * (weight + offset) + b):
                return NormKind(centred, offset)
    return None


def _find_writers(
    calls: list[ModuleCall], x: torch.Tensor, y: torch.Tensor, norms: list[Norm]
) -> list[str]:
    """Returns the names of the linears whose outputs add up to y - x; none if the sum has other terms.

    Args:
        calls: calls of the block's modules.
        x: the residual stream before the block.
        y: the residual stream after it.
        norms: the block's norms; linears that read them are not writers.
    """
    readers = {reader for norm in norms if norm.reads_stream for reader in norm.readers}
    candidates = [
        call
        for call in calls
        if _is_linear(call.module) and call.name not in readers and _same_size(call.y, y)
    ]
    factors = _fit_sum(y - x, [call.y for call in candidates]) or []
    return [
        call.name
        for call, factor in zip(candidates, factors, strict=bool(factors))
        if abs(factor) > NEGLIGIBLE
    ]


def _fit_sum(total: torch.Tensor, terms: list[torch.Tensor]) -> list[float] | None:
    """Returns factors f with Σ f_i · terms_i = total, by least squares; None if there are none."""
    if not bool(total.any()):
        return [0.0] * len(terms)
    if not terms:
        return None
    A = torch.stack([term.reshape(-1) for term in terms], dim=1).to(torch.float64)
    b = total.reshape(-1, 1).to(torch.float64)
    factors = torch.linalg.lstsq(A, b).solution
    return factors.flatten().tolist() if is_close(A @ factors, b) else None


def is_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Tells whether ||a - b|| ≤ tolerance · ||b||."""
    return float((a - b).norm()) <= tolerance * float(b.norm())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)
