"""The environment of a run: versions and hardware that decide its bytes, or are worth recording."""

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

#: Packages that a run uses besides those in `numeric_environment`.
LIBRARIES = ("greenlet", "huggingface-hub", "numpy", "safetensors", "tokenizers")
#: Parts of the names of processor features by which libraries choose their code.
FEATURES = ("avx", "fma", "f16c", "amx", "asimd", "sve", "bf16", "i8mm")


def numeric_environment(device: torch.device) -> dict[str, Any]:
    """Returns everything that the order of summation, and so the last bits of a result, depend on.

    Args:
        device: device that computes.
    """
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "solver": _solver_backend(device),
        "versions": {
            "roundwise": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _solver_backend(device: torch.device) -> str:
    """Returns the name of the solver's backend."""
    if device.type == "cuda":
        return "triton" if triton.available() else "torch"
    return (cpp.load()[1].active if device == HOST else None) or "torch"


def platform_info() -> dict[str, Any]:
    """Returns the platform for the manifest; it does not change when the machine restarts."""
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
    """Returns the processor's name and sorted features; empty where the system does not tell."""
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
    """Describes where two nested values differ, such as "config.bits (3 -> 4)"; empty: nowhere.

    Args:
        old: JSON value before.
        new: JSON value now.
        path: dotted path of both, for the description.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        differences = [
            describe_difference(
                old.get(key, "none"), new.get(key, "none"), f"{path}.{key}".lstrip(".")
            )
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
        return ", ".join(differences)
    short = [str(value) if len(str(value)) < 24 else "…" for value in (old, new)]
    return f"{path} ({short[0]} -> {short[1]})" if short[0] != short[1] else path


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Context manager: torch computes with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
