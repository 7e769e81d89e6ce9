"""Choice of the server for a checkpoint, and the address it listens on."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from roundwise.errors import ConfigError
from roundwise.inference.serving import launch, vllm

VLLM = Path("/somewhere/bin/vllm")


def config(**settings: Any) -> dict[str, Any]:
    usual = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    return {"quantization_config": {**usual, **settings}}


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "find_command", lambda: VLLM)
    monkeypatch.setattr(vllm, "supports_this_cpu", lambda: True)


@pytest.mark.parametrize(
    ("checkpoint", "gpu"),
    [
        (config(), False),
        (config(group_size=-1), False),
        (config(group_size=32), True),
        (config(bits=8), True),
        (config(dynamic={"+:.*q_proj": {"group_size": 64}, "-:.*o_proj": {}}), False),
        ({}, False),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, True),
    ],
)
def test_vllm_serves(checkpoint: dict[str, Any], gpu: bool) -> None:
    assert launch.choose_backend("auto", checkpoint, dtype="auto", gpu=gpu)[0] == VLLM
    assert launch.choose_backend("vllm", checkpoint, dtype="auto", gpu=gpu)[0] == VLLM
    assert launch.choose_backend("transformers", checkpoint, dtype="auto", gpu=gpu) == (
        None,
        "requested",
    )


@pytest.mark.parametrize(
    ("checkpoint", "reason"),
    [
        (config(bits=3), "its kernels take 4 bits, not 3"),
        (config(bits=2), "its kernels take 4 bits, not 2"),
        (config(bits=8), "its kernels take 4 bits, not 8"),
        (config(sym=False), "asymmetric"),
        (config(desc_act=True), "act-order"),
        (config(group_size=16), "no kernel for groups of 16"),
        (config(group_size=256), "no kernel for groups of 256"),
        (config(dynamic={"+:.*q_proj": {"bits": 3}}), "its kernels take 4 bits, not 3"),
    ],
)
def test_vllm_refuses(checkpoint: dict[str, Any], reason: str) -> None:
    command, why = launch.choose_backend("auto", checkpoint, dtype="auto", gpu=False)
    assert command is None
    assert why.startswith("not vLLM: ")
    assert reason in why
    with pytest.raises(ConfigError, match=f"vLLM does not serve this checkpoint: .*{reason}"):
        launch.choose_backend("vllm", checkpoint, dtype="auto", gpu=False)


@pytest.mark.parametrize("checkpoint", [config(), {"quantization_config": {"quant_method": "awq"}}])
def test_a_cpu_without_vllms_kernels(
    checkpoint: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "supports_this_cpu", lambda: False)
    command, why = launch.choose_backend("auto", checkpoint, dtype="auto", gpu=False)
    assert command is None
    assert "need AVX-512" in why
    assert launch.choose_backend("auto", checkpoint, dtype="auto", gpu=True)[0] == VLLM
    assert launch.choose_backend("auto", {}, dtype="auto", gpu=False)[0] == VLLM  # not quantized


def test_float32_is_not_for_vllm() -> None:
    assert "float32" in launch.choose_backend("auto", config(), dtype="float32", gpu=False)[1]


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "find_command", lambda: None)
    assert launch.choose_backend("auto", config(), dtype="auto", gpu=False) == (
        None,
        "vLLM is not installed",
    )
    with pytest.raises(ConfigError, match="vLLM is not installed here: install it"):
        launch.choose_backend("vllm", config(), dtype="auto", gpu=False)
    with pytest.raises(ConfigError, match="--backend 'tgi': use auto, vllm or transformers"):
        launch.choose_backend("tgi", config(), dtype="auto", gpu=False)


def test_addresses() -> None:
    with launch.bind_socket("127.0.0.1", 0) as sock:
        assert launch.is_local(sock)
        with socket.socket() as client:  # nothing listens yet
            assert client.connect_ex(sock.getsockname()) != 0
    with launch.bind_socket("0.0.0.0", 0) as sock:
        assert not launch.is_local(sock)


def test_an_address_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: "):
            launch.bind_socket("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        launch.bind_socket("192.0.2.1", 0)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.check_installed()
    monkeypatch.setattr(launch, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(ConfigError, match=r"uvicorn not installed: pip install '\.\[serve"):
        launch.check_installed()
