"""`roundwise doctor`."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

from roundwise.cli.options import JsonOption
from roundwise.cli.output import print_json, print_labelled
from roundwise.system.console import count_of
from roundwise.system.memory import format_size


@dataclass(frozen=True)
class NativeCode:
    """The C++ extension."""

    active: str | None
    """Instruction set in use; None: it is not used."""
    reason: str


@dataclass(frozen=True)
class Processor:
    """The CPU."""

    name: str
    cores: int | None
    """None: unknown."""
    threads: int
    """Threads that torch computes with."""
    torch_uses: str
    """Instruction set that torch uses."""


@dataclass(frozen=True)
class Diagnosis:
    """Capabilities of machine and installation; `as_dict` is what `roundwise doctor --json` prints."""

    roundwise: str
    python: str
    torch: str
    transformers: str
    native: NativeCode
    processor: Processor
    memory_available_bytes: int
    triton: bool
    cuda: list[str]
    """Names of the GPUs."""

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return asdict(self)


def command(as_json: JsonOption = False) -> None:
    """Show what this machine and installation offer: versions, native code, memory, accelerators."""
    found = diagnose()
    if as_json:
        print_json(found.as_dict())
        return
    native, processor = found.native, found.processor
    print_labelled(
        {
            "roundwise": found.roundwise,
            "python": found.python,
            "torch": found.torch,
            "transformers": found.transformers,
            "native code": f"{native.active or 'not used'}: {native.reason}",
            "processor": f"{processor.name}, {count_of(processor.cores, 'core')}, "
            f"{count_of(processor.threads, 'thread')}, torch uses {processor.torch_uses}",
            "memory": f"{format_size(found.memory_available_bytes)} available",
            "cuda": ", ".join(found.cuda) or "no device",
            "solver on CUDA": "Triton" if found.triton else "torch only: pip install triton",
        },
        width=14,
    )


def diagnose() -> Diagnosis:
    """Returns versions, native code, processor, memory and GPUs."""
    import torch
    import transformers

    from roundwise.core.backends import cpp, triton
    from roundwise.system.memory import available_memory
    from roundwise.version import __version__

    status = cpp.load()[1]
    return Diagnosis(
        roundwise=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        native=NativeCode(status.active, status.reason),
        processor=Processor(
            name=platform.processor() or platform.machine(),
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
            torch_uses=torch.backends.cpu.get_cpu_capability(),
        ),
        memory_available_bytes=available_memory(),
        triton=triton.available(),
        cuda=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    )
