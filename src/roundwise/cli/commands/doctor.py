"""`roundwise doctor`."""

from __future__ import annotations

import os
import platform
from typing import Any

from roundwise.cli.progress import JsonOption, print_json, stdout
from roundwise.system.memory import format_size


def command(as_json: JsonOption = False) -> None:
    """Show what this machine and installation offer: versions, native code, memory, accelerators."""
    import torch
    import transformers

    from roundwise.core.backends import cpp, triton
    from roundwise.system.memory import available_memory
    from roundwise.version import __version__

    status = cpp.load()[1]
    found: dict[str, Any] = {
        "roundwise": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "native": {"active": status.active, "reason": status.reason},
        "processor": {
            "name": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch_uses": torch.backends.cpu.get_cpu_capability(),
        },
        "memory_available_bytes": available_memory(),
        "triton": triton.available(),
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }
    if as_json:
        print_json(found)
        return
    processor = found["processor"]
    for name, text in {
        "roundwise": __version__,
        "python": found["python"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "native code": f"{status.active or 'not used'}: {status.reason}",
        "processor": f"{processor['name']}, {processor['cores']} cores, "
        f"{processor['threads']} threads, torch uses {processor['torch_uses']}",
        "memory": f"{format_size(found['memory_available_bytes'])} available",
        "cuda": ", ".join(found["cuda"]) or "no device",
        "solver on CUDA": "Triton" if triton.available() else "torch alone: pip install triton",
    }.items():
        stdout.print(f"{name:13} {text}", highlight=False, soft_wrap=True)
