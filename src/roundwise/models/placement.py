"""Where tensors are while a model runs on an accelerator: blocks on it, large tables on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from roundwise.core.device import HOST


def moved(value: Any, device: torch.device) -> Any:
    """A value, the tensors in it (however deep in lists and dicts) on a device; all else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(each, device) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(moved(each, device) for each in value)
    return value


def look_up_on_host(table: nn.Embedding, device: torch.device) -> None:
    """Leaves an embedding where it is, mapped from its file: only rows looked up go to the device."""
    table.register_forward_pre_hook(
        lambda _, args, kwargs: (moved(args, HOST), moved(kwargs, HOST)), with_kwargs=True
    )
    table.register_forward_hook(lambda _, args, output: moved(output, device))
