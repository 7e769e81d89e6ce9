"""Who reads the residual stream, through which norm, and who writes into it: read off one small forward.

Nothing is known about the architecture. A forward of a few tokens in float32 runs through the model, one
block in memory at a time; what passes by tells the rest:

    a norm     a module with one number per channel that does what RMSNorm or LayerNorm does
    a reader   a linear layer whose input is the output of a norm whose input is the stream
    a writer   a linear layer whose output is part of the sum that the block adds to the stream

Both are candidates until `models/fold.py` has checked that a fold leaves the model's function as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from roundwise.errors import ConfigError
from roundwise.model.blocks import Block, head_of, wrapped_forwards
from roundwise.model.build import arguments
from roundwise.model.streamed import StreamedModel

#: Tokens of the forward.
TOKENS = 8
#: Relative distance up to which two float32 results count as the same.
TOLERANCE = 1e-4
#: A part whose factor in a sum is smaller is none.
NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Norm:
    """A norm that linears read: y = n(x) · (weight + offset) + bias."""

    name: str
    readers: tuple[str, ...]
    """Linears that are fed with its output."""
    centred: bool
    """n(x) subtracts the mean of x, as LayerNorm does."""
    offset: float
    """1 for models that store gains minus one."""
    of_stream: bool
    """x is the residual stream, not something inside a block."""


@dataclass
class TracedBlock:
    """A block in the forward: what it was called with, and what was called in it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: torch.Tensor
    y: torch.Tensor
    norms: list[Norm]
    writers: list[str]


@dataclass
class ModuleCall:
    """A module without children of its own was called."""

    name: str
    module: nn.Module
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Trace:
    """All that one forward told."""

    width: int
    blocks: list[TracedBlock] = field(default_factory=list)
    last: Norm | None = None
    """The norm in front of the head."""
    logits: torch.Tensor | None = None


def trace(streamed: StreamedModel) -> Trace:
    """Runs the forward; the skeleton is used up by it.

    Args:
        skeleton: of the checkpoint, computing in float32 (`open_streamed_model(…, dtype=torch.float32)`).

    Raises:
        ConfigError: what passes between the blocks is no stream of hidden states.
    """
    model, head = streamed.model, head_of(streamed.model)
    found = Trace(int(model.config.get_text_config().hidden_size))
    inside = {id(module) for block in streamed.blocks for module in block.module.modules()}
    outside = {name: m for name, m in model.named_modules() if id(m) not in inside}

    def gate(block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
        def play(*args: Any, **kwargs: Any) -> Any:
            streamed.load(block.module, block.name)
            with _calls(dict(block.module.named_modules(prefix=block.name))) as calls:
                output = forward(*args, **kwargs)
            x, y = stream_of(args, kwargs), output[0] if isinstance(output, tuple) else output
            if x is None or x.shape[-1] != found.width or y.shape != x.shape:
                raise ConfigError(f"{block.name} does not pass hidden states from block to block")
            norms = list(_norms(calls, x))
            found.blocks.append(
                TracedBlock(args, kwargs, x, y, norms, _writers(calls, x, y, norms))
            )
            streamed.unload(block.module, block.name)
            return output

        return play

    with _calls(outside) as calls:
        found.logits = run_forward(streamed, gate)
    if len(found.blocks) != len(streamed.blocks):
        raise ConfigError("it does not call each of its blocks once")
    for norm in _norms(calls, found.blocks[-1].y):
        if norm.of_stream and norm.readers == (head,):
            found.last = norm
    return found


def stream_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The hidden states that a block was called with."""
    x = args[0] if args else kwargs.get("hidden_states")
    return x if isinstance(x, torch.Tensor) else None


@torch.no_grad()
def run_forward(
    streamed: StreamedModel, gate: Callable[[Block, Callable[..., Any]], Callable[..., Any]]
) -> torch.Tensor:
    """Runs `TOKENS` tokens through the model, its blocks' forwards replaced by what `gate` returns.

    Of the embedding and the head only as many rows are loaded, from the middle of the vocabulary: they
    are the largest tensors, and any rows do.

    Returns:
        Logits of the rows loaded, [1, tokens, rows].
    """
    model, head = streamed.model, streamed.model.get_output_embeddings()
    few = [module for module in (model.get_input_embeddings(), head) if module is not None]
    names = {block.name for block in streamed.blocks}
    for path, module in model.named_modules():
        if any(module is one for one in few):
            _load_rows(streamed, module, path)
        elif not any(path == name or path.startswith(f"{name}.") for name in names):
            streamed.load(module, path, recurse=False)
    count = len(few[0].weight)
    with wrapped_forwards(streamed.blocks, lambda _, block, forward: gate(block, forward)):
        output = model(**arguments(model, torch.arange(count)[None]))
    logits = output.logits
    assert isinstance(logits, torch.Tensor)
    return logits


def _load_rows(streamed: StreamedModel, module: nn.Module, path: str) -> None:
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            info = streamed.checkpoint.tensors[streamed.checkpoint_name_of[f"{path}.{name}"]]
            count = min(TOKENS, info.shape[0])
            part = info.rows((info.shape[0] - count) // 2, count).read().to(streamed.dtype)
            module._parameters[name] = nn.Parameter(part, requires_grad=False)


@contextmanager
def _calls(modules: dict[str, nn.Module]) -> Iterator[list[ModuleCall]]:
    """Calls of modules without children, with copies of what went in and came out."""
    calls: list[ModuleCall] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                calls.append(ModuleCall(name, module, args[0].clone(), output.clone()))

        return hook

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in modules.items()
        if not any(True for _ in module.children())
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _norms(calls: list[ModuleCall], stream: torch.Tensor) -> Iterator[Norm]:
    """The norms that linears read, in order; weights are loaded."""
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
        kind = gain_kind(call.module, call.x.shape[-1]) if readers else None
        if kind is not None:
            before = [c.y for c in calls[:index] if _is_linear(c.module)]
            yield Norm(call.name, tuple(readers), *kind, _is_stream(call.x, stream, before))


def _is_stream(x: torch.Tensor, entered: torch.Tensor, outputs: list[torch.Tensor]) -> bool:
    """Whether x is what entered the block plus outputs of linears."""
    if not _alike(x, entered):  # some models flatten the tokens
        return False
    parts = [y for y in outputs if _alike(y, x)]
    return _sum_of(x.reshape(entered.shape) - entered, parts) is not None


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same tokens and channels, however the tokens are laid out."""
    return a.numel() == b.numel() and a.shape[-1] == b.shape[-1]


def gain_kind(module: nn.Module, width: int) -> tuple[bool, float] | None:
    """(subtracts the mean, offset of its gains) if `module` normalises and scales each channel.

    Found by what it does to random rows, so large that no epsilon counts; None: it does something else.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, torch.Tensor) or weight.shape != (width,):
        return None
    generator = torch.Generator().manual_seed(0)
    x = 1000 * (torch.randn(16, width, generator=generator) + 0.5)
    y = module(x)
    shift = bias if isinstance(bias, torch.Tensor) else torch.zeros(width)
    for centred in (False, True):
        middle = x - x.mean(dim=-1, keepdim=True) if centred else x
        normed = middle / middle.square().mean(dim=-1, keepdim=True).sqrt()
        for offset in (0.0, 1.0):
            if is_close(y, normed * (weight + offset) + shift):
                return centred, offset
    return None


def _writers(
    calls: list[ModuleCall], x: torch.Tensor, y: torch.Tensor, norms: list[Norm]
) -> list[str]:
    """The linears whose outputs make up y - x; none if something else is in the sum."""
    readers = {reader for norm in norms if norm.of_stream for reader in norm.readers}
    candidates = [
        call
        for call in calls
        if _is_linear(call.module) and call.name not in readers and _alike(call.y, y)
    ]
    factors = _sum_of(y - x, [call.y for call in candidates]) or []
    return [
        call.name
        for call, factor in zip(candidates, factors, strict=bool(factors))
        if abs(factor) > NEGLIGIBLE
    ]


def _sum_of(total: torch.Tensor, parts: list[torch.Tensor]) -> list[float] | None:
    """Factors with which `parts` add up to `total`; None if they do not."""
    if not bool(total.any()):
        return [0.0] * len(parts)
    if not parts:
        return None
    A = torch.stack([part.reshape(-1) for part in parts], dim=1).to(torch.float64)
    b = total.reshape(-1, 1).to(torch.float64)
    factors = torch.linalg.lstsq(A, b).solution
    return factors.flatten().tolist() if is_close(A @ factors, b) else None


def is_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """||a - b|| is a small part of ||b||."""
    return float((a - b).norm()) <= tolerance * float(b.norm())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)
