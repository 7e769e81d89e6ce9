"""Serving with vLLM: finds it, tells whether it supports a checkpoint, builds its command line.

vLLM reads the settings in config.json, so these decide here too (checkpoint/engines.py has its rules).
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from roundwise.checkpoint import engines
from roundwise.checkpoint.compressed_tensors import METHOD, is_supported
from roundwise.checkpoint.config_values import flag
from roundwise.checkpoint.quantization_config import (
    QuantizationConfig,
    parse_quantization_config,
    quantization_method,
    quantizes_towers,
)


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
    quantization: str = ""
    """Option for the format of the checkpoint; empty: vLLM reads it from config.json."""


def find_command() -> Path | None:
    """Returns the path of the `vllm` command: beside this Python, or on the PATH; None: not installed.

    It may be in another environment than roundwise.
    """
    beside = Path(sys.executable).with_name("vllm")
    path = str(beside) if beside.exists() else shutil.which("vllm")
    return Path(path).resolve() if path else None


def quantization_option(
    config: Mapping[str, Any], *, dtype: str, gpu: bool
) -> tuple[str, str | None]:
    """Tells whether vLLM serves a checkpoint, and how.

    Args:
        config: the checkpoint's config.json.
        dtype: dtype to compute in: auto, float32, float16 or bfloat16.
        gpu: True if vLLM will run on a GPU.

    Returns:
        The option that it needs, such as `--quantization humming`, or an empty text; and why vLLM does
        not serve the checkpoint, None: no reason is known.
    """
    raw = config.get("quantization_config")
    if not isinstance(raw, Mapping):
        return "", None
    option, reason = "", None
    is_gptq = raw.get("quant_method") == "gptq"
    # Other formats are left to vLLM.
    if is_gptq or (quantization_method(raw) == METHOD and is_supported(raw)):
        layers = _served_layers(parse_quantization_config(raw, "the checkpoint"))
        option, reason = engines.choose_option(
            engines.VLLM_GPU if gpu else engines.VLLM_CPU, layers
        )
        if is_gptq and dtype == "float32":
            reason = "it computes GPTQ layers in float16 or bfloat16, not in float32"
    if reason is None and not gpu and not supports_this_cpu():
        reason = "its kernels for quantized layers on CPUs need AVX-512, which this processor lacks"
    return option, reason


def _served_layers(config: QuantizationConfig) -> list[engines.ServedLayer]:
    """Returns the settings of layers that a quantization config names."""
    every = [config.default, *config.names.values(), *(settings for _, settings in config.rules)]
    head = flag(config.raw, "lm_head") or config.names.get("lm_head") is not None
    layers = [
        engines.ServedLayer(
            bits=each.bits, group_size=each.group_size or 128, sym=each.sym is not False,
            desc_act=bool(each.desc_act), format=config.checkpoint_format,
        )
        for each in every
        if each is not None and each.bits is not None
    ]  # fmt: skip
    towers = quantizes_towers(config.raw)
    return [
        *layers,
        *(replace(layer, is_head=True) for layer in layers[:1] if head),
        *(replace(layer, is_tower=True) for layer in layers[:1] if towers),
    ]


def supports_this_cpu() -> bool:
    """Tells whether vLLM has kernels for quantized layers on this processor; on x86 they need AVX-512.

    Without them its server starts, and fails at the first request (observed with 0.32.0).
    """
    x86 = platform.machine() in ("x86_64", "AMD64")
    return not x86 or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def command_line(command: Path, folder: Path, options: VllmOptions) -> list[str]:
    """Returns the command line that serves a folder.

    It has no API key (pass it in the environment, as VLLM_API_KEY) and `--quantization` only where
    vLLM's own choice of a kernel would refuse the checkpoint.

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
    line += options.quantization.split()
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
