"""The repeated blocks of a model and the linears in them, found by shape, not by name.

The output head as one more block: found, given a weight of its own where it shares the embedding's.

A tied head is the embedding table, which stays as it is; so a quantized head needs its own tensor, and
the config must no longer say that the two are one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from roundwise.checkpoint.reader import Checkpoint, CheckpointView
from roundwise.errors import ConfigError
from roundwise.model.expert_weights import routers_of
from roundwise.model.moe import LinearExperts

#: A linear with fewer channels stays: it holds next to nothing, and codes are packed 32 to a few words.
MIN_CHANNELS = 32


@dataclass
class Block:
    """One of the repeated blocks."""

    name: str
    """Prefix of its modules, such as model.layers.3."""
    module: nn.Module
    linears: dict[str, nn.Module]
    """Full module name -> nn.Linear or Conv1D, in order of definition."""
    skipped_linears: dict[str, str] = field(default_factory=dict)
    """Full name of linears that are never quantized, and what they are."""
    stack: int = 0
    """Which of several lists of blocks it is in: a decoder's follow an encoder's."""
    is_head: bool = False
    """The output head; `module` is a `OutputHead`, its name that of the layer in it."""

    @property
    def prefix(self) -> str:
        """What the names of the modules in `module` begin with."""
        return self.name.rpartition(".")[0] if self.is_head else self.name

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(full name, module) of everything inside."""
        for path, module in self.module.named_modules(prefix=self.prefix):
            if module is not self.module:
                yield path.removeprefix("."), module

    @property
    def experts(self) -> dict[str, LinearExperts]:
        """Full module name -> mixture of experts."""
        return {name: m for name, m in self.modules() if isinstance(m, LinearExperts)}


def find_blocks(model: nn.Module) -> list[Block]:
    """The repeated blocks: the outermost ModuleList that holds most linear weights.

    An encoder-decoder has two such lists. Of a model with towers for pictures or sound, the language
    model's is taken.

    Raises:
        ConfigError: there is none.
    """
    found = []
    for stack, scope in enumerate(_scopes(model)):
        best = _largest_list(model, scope)
        if best is not None:
            modules = model.get_submodule(best)
            assert isinstance(modules, nn.ModuleList)
            found += [_block(f"{best}.{i}", module, stack) for i, module in enumerate(modules)]
    if not any(block.linears for block in found):
        raise ConfigError(
            f"{type(model).__name__} has no repeated blocks with linear layers: nothing to quantize"
        )
    return found


@contextmanager
def wrapped_forwards(
    blocks: Sequence[Block],
    wrap: Callable[[int, Block, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Context manager: replaces the forward of each block by `wrap(index, block, forward)`."""
    for index, block in enumerate(blocks):
        block.module.forward = wrap(index, block, block.module.forward)
    try:
        yield
    finally:
        for block in blocks:
            vars(block.module).pop("forward", None)


def head_block(model: PreTrainedModel) -> Block:
    """The output head as a block; it is put into a module of its own."""
    name = head_of(model)
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    head = OutputHead(name.rpartition(".")[2], linear)
    model.set_submodule(name, head)
    return Block(name, head, {name: linear}, is_head=True)


def _scopes(model: nn.Module) -> list[str]:
    """Where to look for lists of blocks, in the order in which they are called; "": everywhere."""
    if not isinstance(model, PreTrainedModel):
        return [""]
    config = model.config
    names: dict[nn.Module | None, str] = {m: name for name, m in model.named_modules()}
    if getattr(config, "is_encoder_decoder", False):
        return [names[model.get_encoder()], names[model.get_decoder()]]
    text = config.get_text_config()
    if text is config:
        return [""]
    inner = [
        name
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and module.config is text
    ]
    return inner[:1] or [""]


def _largest_list(model: nn.Module, scope: str) -> str | None:
    best, best_size = None, 0
    lists: set[str] = set()
    for name, module in model.get_submodule(scope).named_modules(prefix=scope):
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            lists.add(name)
            size = sum(linear.weight.numel() for _, linear in _linears(module))
            if size > best_size:
                best, best_size = name, size
    return best


def _block(name: str, module: nn.Module, stack: int) -> Block:
    left = {f"{name}.{n}": reason for n, reason in routers_of(module).items()}
    linears = {}
    for n, linear in _linears(module):
        full = f"{name}.{n}"
        if full in left:
            continue
        if not _is_product(linear):
            left[full] = f"{type(linear).__name__} computes more than a product"
        elif min(linear.weight.shape) < MIN_CHANNELS:
            left[full] = f"it has fewer than {MIN_CHANNELS} channels"
        else:
            linears[full] = linear
    return Block(name, module, linears, left, stack=stack)


def _is_product(linear: nn.Module) -> bool:
    """Whether a linear of a class of its own computes x Wᵀ + b, tried on small numbers."""
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    trial = copy.copy(linear)
    generator = torch.Generator().manual_seed(0)
    W, b, x = (torch.randn(*shape, generator=generator) for shape in ((4, 8), (4,), (3, 8)))
    bias = b if linear.bias is not None else None
    trial._parameters = {
        "weight": nn.Parameter(W),
        "bias": nn.Parameter(b) if bias is not None else None,
    }
    with torch.no_grad():
        try:
            y = trial(x)
        except (RuntimeError, TypeError, AttributeError, IndexError):  # it takes something else
            return False
        return isinstance(y, torch.Tensor) and torch.allclose(
            y, nn.functional.linear(x, W, bias), atol=1e-5
        )


def weight_of(linear: nn.Module) -> torch.Tensor:
    """The weight as [out, in]; Conv1D keeps it as [in, out]."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(linear, Conv1D) else weight


def set_weight(linear: nn.Module, W: torch.Tensor) -> None:
    """Replaces the weight by W [out, in] in the dtype it had."""
    dtype = weight_of(linear).dtype
    value = W.T.contiguous() if isinstance(linear, Conv1D) else W
    linear.weight = nn.Parameter(value.to(dtype), requires_grad=False)


def _linears(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            yield name, child


TIED = "tie_word_embeddings"


class OutputHead(nn.Module):
    """A head with a forward of its own around the linear layer's, where it can be stopped.

    Args:
        name: of the layer in its parent.
        linear: the layer.
    """

    def __init__(self, name: str, linear: nn.Linear) -> None:
        super().__init__()
        self.add_module(name, linear)

    def forward(self, x: torch.Tensor) -> Any:
        """Logits."""
        (linear,) = self._modules.values()
        assert linear is not None
        return linear(x)


def head_of(model: PreTrainedModel) -> str:
    """Name of the linear layer that makes logits.

    Raises:
        ConfigError: the model's head is something else.
    """
    head = model.get_output_embeddings()
    names: dict[str, nn.Module] = dict(model.named_modules())
    name = next((name for name, module in names.items() if module is head), None)
    if name is None or not isinstance(head, nn.Linear):
        raise ConfigError(f"{type(model).__name__} has no linear head")
    return name


def is_tied(config: Any) -> bool:
    """Whether a config says that head and embedding are one."""
    return bool(getattr(config, TIED, False) or getattr(config.get_text_config(), TIED, False))


def untie(config: Any) -> None:
    """Has a config say that the head has a weight of its own."""
    for part in (config, config.get_text_config()):
        if hasattr(part, TIED):
            setattr(part, TIED, False)


def untied_checkpoint(
    checkpoint: Checkpoint, model: PreTrainedModel, checkpoint_name_of: dict[str, str]
) -> Checkpoint:
    """The checkpoint with a tensor for the head, which it may share with the embedding as it is.

    Args:
        checkpoint: the original.
        model: built from a config that `untie` has seen.
        source_of: names of the model's tensors in the checkpoint; that of the head becomes its own.

    Raises:
        ConfigError: the model cannot have a head of its own.
    """
    name = f"{head_of(model)}.weight"
    stored = checkpoint_name_of[name]
    if list(checkpoint_name_of.values()).count(stored) == 1:
        return checkpoint
    kind = type(model).__name__
    if name in (getattr(model, "all_tied_weights_keys", None) or {}):
        raise ConfigError(
            f"--lm-head: {kind} ties its head to the embedding whatever its config says"
        )
    if TIED in inspect.getsource(type(model).forward):
        raise ConfigError(
            f"--lm-head: {kind} computes in another way if its head is not tied to the embedding"
        )
    checkpoint_name_of[name] = name
    tensors = {**checkpoint.tensors, name: checkpoint.tensors[stored]}
    config = {**checkpoint.config, TIED: False}
    if TIED in checkpoint.config.get("text_config", {}):
        config["text_config"] = {**checkpoint.config["text_config"], TIED: False}
    return CheckpointView(checkpoint, tensors, config)
