"""Devices by name: the CPU (`HOST`) or an accelerator that torch supports; memory, moving tensors.

While a model runs on an accelerator, its blocks are loaded there and large embeddings stay on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from roundwise.errors import ConfigError

#: The CPU: results are kept there, whichever device computes them.
HOST = torch.device("cpu")


def parse_device(name: str) -> torch.device:
    """Returns a device by its name; "auto" is the first GPU if there is one, else the CPU.

    Raises:
        ConfigError: there is no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        count = device_count(device)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not known: use auto, cpu or cuda") from None
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ConfigError(f"device {name!r}: torch sees {count} {device.type.upper()} devices")
    return device


def device_count(device: torch.device) -> int:
    """Returns the number of devices of this type."""
    return int(torch.get_device_module(device).device_count())


def device_name(device: torch.device) -> str:
    """Returns "cpu", or the accelerator's name such as "NVIDIA H100 80GB HBM3"."""
    if device.type == "cpu":
        return "cpu"
    return str(torch.get_device_module(device).get_device_name(device))


def free_memory(device: torch.device) -> int:
    """Returns the free memory of an accelerator in bytes."""
    return int(torch.get_device_module(device).mem_get_info(device)[0])


def peak_memory(device: torch.device) -> int | None:
    """Returns the peak memory of tensors on an accelerator so far, in bytes; None for the CPU."""
    if device.type == "cpu":
        return None
    return int(torch.get_device_module(device).max_memory_allocated(device))


def synchronize(device: torch.device) -> None:
    """Synchronizes the device, so that timings include queued kernels."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def to_device(value: Any, device: torch.device) -> Any:
    """Returns `value` with every tensor in it, also inside lists, tuples and dicts, on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(to_device(item, device) for item in value)
    return value


def keep_embedding_on_host(embedding: nn.Embedding, device: torch.device) -> None:
    """Keeps an embedding on the host, mapped from its file: only the rows looked up go to `device`."""
    embedding.register_forward_pre_hook(
        lambda _, args, kwargs: (to_device(args, HOST), to_device(kwargs, HOST)), with_kwargs=True
    )
    embedding.register_forward_hook(lambda _, args, output: to_device(output, device))
