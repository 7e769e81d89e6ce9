"""The output head as one more block: found, given a weight of its own where it shares the embedding's.

A tied head is the embedding table, which stays as it is; so a quantized head needs its own tensor, and
the config must no longer say that the two are one.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from roundwise.errors import ConfigError
from roundwise.models.checkpoint import Checkpoint, CheckpointView

TIED = "tie_word_embeddings"


class Head(nn.Module):
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


def untied(checkpoint: Checkpoint, model: PreTrainedModel, source_of: dict[str, str]) -> Checkpoint:
    """The checkpoint with a tensor for the head, which it may share with the embedding as it is.

    Args:
        checkpoint: the original.
        model: built from a config that `untie` has seen.
        source_of: names of the model's tensors in the checkpoint; that of the head becomes its own.

    Raises:
        ConfigError: the model cannot have a head of its own.
    """
    name = f"{head_of(model)}.weight"
    stored = source_of[name]
    if list(source_of.values()).count(stored) == 1:
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
    source_of[name] = name
    tensors = {**checkpoint.tensors, name: checkpoint.tensors[stored]}
    config = {**checkpoint.config, TIED: False}
    if TIED in checkpoint.config.get("text_config", {}):
        config["text_config"] = {**checkpoint.config["text_config"], TIED: False}
    return CheckpointView(checkpoint, tensors, config)
