"""Devices by name, tensors moved between them, embeddings that stay on the host."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from roundwise.errors import ConfigError
from roundwise.system.device import (
    HOST,
    device_count,
    device_name,
    keep_embedding_on_host,
    parse_device,
    peak_memory,
    synchronize,
    to_device,
)


def test_the_cpu() -> None:
    assert parse_device("cpu") == HOST
    assert device_name(HOST) == "cpu"
    assert device_count(HOST) == 1
    assert peak_memory(HOST) is None
    synchronize(HOST)  # a no-op


@pytest.mark.parametrize(("gpu", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_a_gpu_if_there_is_one(
    gpu: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert parse_device("auto") == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "device 'tpu' is not known: use auto, cpu or cuda"),
        ("meta", "device 'meta' is not known"),
        ("cuda:99", "device 'cuda:99': torch sees [0-9]+ CUDA devices"),
    ],
)
def test_devices_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_device(name)


def test_tensors_in_nested_containers_are_moved() -> None:
    x = torch.zeros(2)
    moved = to_device({"a": [x, (x, None)], "b": "text"}, torch.device("meta"))
    assert moved["a"][0].device.type == moved["a"][1][0].device.type == "meta"
    assert isinstance(moved["a"][1], tuple)
    assert (moved["a"][1][1], moved["b"]) == (None, "text")
    assert to_device(x, HOST) is x


def test_an_embedding_on_the_host_returns_rows_on_the_device() -> None:
    embedding = nn.Embedding(8, 4)
    devices: list[torch.device] = []
    embedding.register_forward_pre_hook(lambda _, args: devices.append(args[0].device))
    keep_embedding_on_host(embedding, torch.device("meta"))
    assert embedding(torch.tensor([1, 2])).device.type == "meta"
    assert embedding.weight.device == HOST
    assert devices == [HOST]
