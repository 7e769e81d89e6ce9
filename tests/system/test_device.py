"""Names of devices."""

from __future__ import annotations

import pytest
import torch

from roundwise.errors import ConfigError
from roundwise.system.device import parse_device


def test_names_of_devices() -> None:
    assert parse_device("cpu") == torch.device("cpu")
    assert parse_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="'tpu' is not known"):
        parse_device("tpu")
    with pytest.raises(ConfigError, match="torch sees"):
        parse_device("cuda:99")
