"""What a run finds on the machine: what decides the bytes of its result, and what is worth recording."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from roundwise.core.backends import cpp, triton
from roundwise.system.device import HOST, device_name
from roundwise.system.distributed import current_ranks
from roundwise.version import __version__

#: Packages beside those in `numeric_environment` that take part in a run.
LIBRARIES = ("greenlet", "huggingface-hub", "numpy", "safetensors", "tokenizers")
#: Features of a processor that libraries choose their code by.
FEATURES = ("avx", "fma", "f16c", "amx", "asimd", "sve", "bf16", "i8mm")


def numeric_environment(device: torch.device) -> dict[str, Any]:
    """What the order of summation, and so the last bits, depend on; `device` computes."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "solver": _solver(device),
        "versions": {
            "roundwise": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _solver(device: torch.device) -> str:
    """What the inner loops run on."""
    if device.type == "cuda":
        return "triton" if triton.available() else "torch"
    return (cpp.load()[1].active if device == HOST else None) or "torch"


def platform_info() -> dict[str, Any]:
    """The platform, for the manifest; the same from one start of a machine to the next."""
    name, flags = _processor()
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.system(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "processor": name,
        "features": [flag for flag in flags if any(part in flag for part in FEATURES)],
        "ranks": current_ranks().count,
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _processor() -> tuple[str, list[str]]:
    """Its name and sorted features, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor(), []
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return fields.get("model name") or platform.processor(), sorted(flags)


def describe_difference(old: Any, new: Any, path: str = "") -> str:
    """Where two nested values differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [
            describe_difference(
                old.get(key, "none"), new.get(key, "none"), f"{path}.{key}".lstrip(".")
            )
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
        return ", ".join(parts)
    short = [str(value) if len(str(value)) < 24 else "…" for value in (old, new)]
    return f"{path} ({short[0]} -> {short[1]})" if short[0] != short[1] else path


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Computes with `count` threads in this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
