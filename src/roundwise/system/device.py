"""Devices by name, and what they hold: a GPU, or any other accelerator that torch knows.

Where tensors are while a model runs on an accelerator: blocks on it, large tables on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from roundwise.errors import ConfigError

#: Where everything begins and ends.
HOST = torch.device("cpu")


def parse_device(name: str) -> torch.device:
    """A device by its name; "auto" is the first GPU where there is one, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        there = device_count(device)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not known: use auto, cpu or cuda") from None
    if device.type != "cpu" and (device.index or 0) >= there:
        raise ConfigError(f"device {name!r}: torch sees {there} {device.type.upper()} devices")
    return device


def device_count(device: torch.device) -> int:
    """How many devices of this type there are."""
    return int(torch.get_device_module(device).device_count())


def device_name(device: torch.device) -> str:
    """What a device is: cpu, or the accelerator's name such as NVIDIA H100 80GB HBM3."""
    if device.type == "cpu":
        return "cpu"
    return str(torch.get_device_module(device).get_device_name(device))


def free_memory(device: torch.device) -> int:
    """Bytes that an accelerator has free."""
    return int(torch.get_device_module(device).mem_get_info(device)[0])


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that tensors have held on an accelerator so far; None for the CPU."""
    if device.type == "cpu":
        return None
    return int(torch.get_device_module(device).max_memory_allocated(device))


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has done what it was given: without it, times are those of asking."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def to_device(value: Any, device: torch.device) -> Any:
    """A value, the tensors in it (however deep in lists and dicts) on a device; all else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(each, device) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(to_device(each, device) for each in value)
    return value


def keep_embedding_on_host(table: nn.Embedding, device: torch.device) -> None:
    """Leaves an embedding where it is, mapped from its file: only rows looked up go to the device."""
    table.register_forward_pre_hook(
        lambda _, args, kwargs: (to_device(args, HOST), to_device(kwargs, HOST)), with_kwargs=True
    )
    table.register_forward_hook(lambda _, args, output: to_device(output, device))
