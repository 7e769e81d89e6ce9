"""Finds a model's repeated blocks, the linear layers in them, and the output head.

Blocks are found by their structure, not by name, so no file per architecture is needed. With --lm-head
the output head becomes one more block. A tied head shares the embedding table, which is not quantized,
so a quantized head gets its own tensor and the config must no longer say that the two are tied.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from roundwise.checkpoint.reader import Checkpoint, CheckpointView
from roundwise.errors import CheckpointError, ConfigError
from roundwise.model.build import text_config
from roundwise.model.expert_weights import router_linears
from roundwise.model.moe import LinearExperts

#: Linears with fewer channels are skipped: they hold few weights, and codes are packed in blocks of 32.
MIN_CHANNELS = 32


@dataclass
class Block:
    """One of the repeated blocks of a model, or its output head."""

    name: str
    """Prefix of its modules, such as model.layers.3; of the head, the full name of its linear layer."""
    module: nn.Module
    linears: dict[str, nn.Module]
    """Full module name -> nn.Linear or Conv1D to quantize, in order of definition."""
    skipped_linears: dict[str, str] = field(default_factory=dict)
    """Full name of linears that are never quantized -> the reason."""
    stack: int = 0
    """Index of the list of blocks it belongs to: 0 for an encoder's, 1 for the decoder's behind it."""
    is_head: bool = False
    """The block is the output head; `module` is an `OutputHead`."""

    @property
    def prefix(self) -> str:
        """Prefix of the full names of the modules in `module`."""
        return self.name.rpartition(".")[0] if self.is_head else self.name

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields (full name, module) of every module inside the block."""
        for path, module in self.module.named_modules(prefix=self.prefix):
            if module is not self.module:
                yield path.removeprefix("."), module

    @property
    def experts(self) -> dict[str, LinearExperts]:
        """Full module name -> mixture of experts, for all in the block."""
        return {name: m for name, m in self.modules() if isinstance(m, LinearExperts)}


def find_blocks(model: nn.Module) -> list[Block]:
    """Returns the repeated blocks: the outermost ModuleList that holds most linear weights.

    An encoder-decoder has two such lists. If the model has vision or audio towers, only the list of the
    language model is used.

    Raises:
        ConfigError: there are no repeated blocks with linear layers.
    """
    blocks = []
    for stack, root in enumerate(_search_roots(model)):
        for name in _module_lists(model, root):
            modules = model.get_submodule(name)
            assert isinstance(modules, nn.ModuleList)
            blocks += [_make_block(*named, stack) for named in _flat_list(name, modules)]
    if not any(block.linears for block in blocks):
        raise ConfigError(
            f"{type(model).__name__} has no repeated blocks with linear layers: nothing to quantize"
        )
    return blocks


def _flat_list(name: str, modules: nn.ModuleList) -> Iterator[tuple[str, nn.Module]]:
    """Yields (name, module) of a list's modules; lists of modules in it are not called themselves."""
    for index, module in enumerate(modules):
        holds_linears = any(isinstance(child, nn.Linear | Conv1D) for child in module.children())
        if isinstance(module, nn.ModuleList) and not holds_linears:
            yield from _flat_list(f"{name}.{index}", module)
        else:
            yield f"{name}.{index}", module


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
    """Wraps the output head of a model in an `OutputHead` and returns it as a block.

    Raises:
        ConfigError: the head is not a linear layer.
    """
    name = output_head_name(model)
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    head = OutputHead(name.rpartition(".")[2], linear)
    model.set_submodule(name, head)
    return Block(name, head, {name: linear}, is_head=True)


def _search_roots(model: nn.Module) -> list[str]:
    """Returns the modules to search for lists of blocks, in call order; "" is the whole model."""
    if not isinstance(model, PreTrainedModel):
        return [""]
    config = model.config
    names: dict[nn.Module | None, str] = {m: name for name, m in model.named_modules()}
    if getattr(config, "is_encoder_decoder", False):
        return [names[model.get_encoder()], names[model.get_decoder()]]
    text = text_config(config)
    if text is config:
        return [""]
    text_models = [
        name
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and module.config is text
    ]
    return text_models[:1] or [""]


def _module_lists(model: nn.Module, root: str) -> list[str]:
    """Returns the name of the outermost ModuleList below `root` with most linear weights.

    Others of the same length whose modules are of the same classes (HRM has two) are returned too.
    """
    sizes: dict[str, int] = {}
    kinds: dict[str, list[type]] = {}
    outside = tuple(f"{name}." for name in towers(model))
    outermost: set[str] = set()
    for name, module in model.get_submodule(root).named_modules(prefix=root):
        nested = any(name.startswith(f"{outer}.") for outer in outermost)
        if isinstance(module, nn.ModuleList) and not nested and not name.startswith(outside):
            outermost.add(name)
            if all(isinstance(child, nn.Linear | Conv1D) for child in module):
                continue  # several heads, or adapters
            kinds[name] = [type(child) for child in module]
            sizes[name] = sum(linear.weight.numel() for _, linear in _named_linears(module))
    best = max(sizes, key=sizes.__getitem__, default=None)
    if best is None or not sizes[best]:
        return []
    return [name for name in sizes if name == best or kinds[name] == kinds[best]]


def towers(model: nn.Module) -> list[str]:
    """Returns the parts of a text model that are models of pictures or sound."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return []
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and not _takes_text(module)
    ]


def _takes_text(model: PreTrainedModel) -> bool:
    """Tells whether the forward of a part of a model may take tokens."""
    parameters = inspect.signature(model.forward).parameters.values()
    passes_on = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    return passes_on or any(p.name == "input_ids" for p in parameters)


def _make_block(name: str, module: nn.Module, stack: int) -> Block:
    """Returns the block of a module, its linears sorted into those to quantize and those to skip."""
    skipped = {f"{name}.{path}": reason for path, reason in router_linears(module).items()}
    linears = {}
    for path, linear in _named_linears(module):
        full_name = f"{name}.{path}"
        if full_name in skipped:
            continue
        if not _is_plain_matmul(linear):
            skipped[full_name] = f"{type(linear).__name__} computes more than a matrix product"
        elif min(linear.weight.shape) < MIN_CHANNELS:
            skipped[full_name] = f"it has fewer than {MIN_CHANNELS} channels"
        else:
            linears[full_name] = linear
    return Block(name, module, linears, skipped, stack=stack)


def _is_plain_matmul(linear: nn.Module) -> bool:
    """Tells whether a linear computes x Wᵀ + b; forwards of subclasses are tried on small inputs."""
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    small = copy.copy(linear)
    generator = torch.Generator().manual_seed(0)
    W, b, x = (torch.randn(*shape, generator=generator) for shape in ((4, 8), (4,), (3, 8)))
    bias = b if linear.bias is not None else None
    small._parameters = {
        "weight": nn.Parameter(W),
        "bias": nn.Parameter(b) if bias is not None else None,
    }
    with torch.no_grad():
        try:
            y = small(x)
        except (RuntimeError, TypeError, AttributeError, IndexError):  # it takes other arguments
            return False
        return isinstance(y, torch.Tensor) and torch.allclose(
            y, nn.functional.linear(x, W, bias), atol=1e-5
        )


def weight_of(linear: nn.Module) -> torch.Tensor:
    """Returns the weight of a linear as [out, in]; Conv1D stores it as [in, out]."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(linear, Conv1D) else weight


def set_weight(linear: nn.Module, W: torch.Tensor) -> None:
    """Replaces the weight of a linear by W [out, in], converted to the dtype of the old weight."""
    dtype = weight_of(linear).dtype
    value = W.T.contiguous() if isinstance(linear, Conv1D) else W
    linear.weight = nn.Parameter(value.to(dtype), requires_grad=False)


def _named_linears(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields (name, module) of every nn.Linear and Conv1D below a module."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            yield name, child


#: Setting of a config: output head and embedding share one weight.
TIED = "tie_word_embeddings"
#: Names that models give their output head.
HEADS = ("lm_head", "embed_out")


class OutputHead(nn.Module):
    """Module around the linear layer of the output head, so that it can be paused like a block.

    Args:
        name: name of the linear layer in its parent module.
        linear: the linear layer.
    """

    def __init__(self, name: str, linear: nn.Linear) -> None:
        super().__init__()
        self.add_module(name, linear)

    def forward(self, x: torch.Tensor) -> Any:
        """Returns the logits [..., vocabulary] of hidden states [..., hidden]."""
        (linear,) = self._modules.values()
        assert linear is not None
        return linear(x)


def output_head_name(model: PreTrainedModel) -> str:
    """Returns the name of the linear layer that computes the logits.

    Raises:
        ConfigError: the model has no output head, or it is not a linear layer.
    """
    head = model.get_output_embeddings()
    names: dict[str, nn.Module] = dict(model.named_modules())
    name = next((name for name, module in names.items() if module is head), None)
    if name is None or not isinstance(head, nn.Linear):
        raise ConfigError(f"{type(model).__name__} has no linear head")
    return name


def is_tied(config: Any) -> bool:
    """Tells whether a transformers config says that output head and embedding share one weight."""
    return bool(getattr(config, TIED, False) or getattr(text_config(config), TIED, False))


def quantized_head(layers: Iterable[str]) -> str | None:
    """Returns the name of the output head among quantized layers; None: it is not among them."""
    return next((name for name in layers if name.rpartition(".")[2] in HEADS), None)


def check_quantized_head(config: Callable[[], Any], layers: Iterable[str]) -> None:
    """Refuses a quantized output head in a model whose config ties the head to the embedding.

    Some readers would use the embedding instead of the head in the files, others the head.

    Args:
        config: returns transformers' config of the model; called only if the head is quantized.
        layers: names of the quantized layers in the files.

    Raises:
        CheckpointError: the head is among them, and tied.
    """
    head = quantized_head(layers)
    if head is not None and is_tied(config()):
        raise CheckpointError(
            f"the output head is quantized ({head}), but the config ties it to the embedding: set "
            f"{TIED} to false in config.json if these are the right files"
        )


def untie(config: Any) -> None:
    """Changes a transformers config so that the output head has its own weight."""
    for part in (config, text_config(config)):
        if hasattr(part, TIED):
            setattr(part, TIED, False)


def untied_checkpoint(
    checkpoint: Checkpoint, model: PreTrainedModel, checkpoint_name_of: dict[str, str]
) -> Checkpoint:
    """Returns a view of the checkpoint in which the output head has its own tensor.

    If the files store one tensor for head and embedding, the view has it under both names.

    Args:
        checkpoint: the original.
        model: the model, built from a config that `untie` has changed.
        checkpoint_name_of: names of the model's tensors in the checkpoint; that of the head is updated.

    Raises:
        ConfigError: the model always ties its head, or computes differently when it is untied.
    """
    name = f"{output_head_name(model)}.weight"
    stored = checkpoint_name_of[name]
    if list(checkpoint_name_of.values()).count(stored) == 1:
        return checkpoint
    kind = type(model).__name__
    if name in (getattr(model, "all_tied_weights_keys", None) or {}):
        raise ConfigError(
            f"--lm-head is not possible: {kind} always ties its head to the embedding"
        )
    if TIED in inspect.getsource(type(model).forward):
        raise ConfigError(
            f"--lm-head is not possible: {kind} computes differently if its head is not tied to the "
            "embedding"
        )
    checkpoint_name_of[name] = name
    tensors = {**checkpoint.tensors, name: checkpoint.tensors[stored]}
    config = {**checkpoint.config, TIED: False}
    if TIED in checkpoint.config.get("text_config", {}):
        config["text_config"] = {**checkpoint.config["text_config"], TIED: False}
    return CheckpointView(checkpoint, tensors, config)
