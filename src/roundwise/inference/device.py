"""Where a model goes when nobody says."""

from __future__ import annotations

import torch

from roundwise.errors import ConfigError


def parse_device(name: str) -> torch.device:
    """A device by its name; "auto" is the first GPU where there is one, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not known: use auto, cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device
