"""Frame of every `run_TOOL.py` beside it: one job in one process, with its time and peak memory.

    python run_TOOL.py JOB.json RESULT.json

Run by each tool's own interpreter; knows nothing of roundwise, and only the standard library. The job
holds `model` (folder), `out` (folder to write), `windows` (lists of token ids) and `settings`.
"""

import importlib.metadata
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: What it returns, if anything, goes into the result.
Quantize = Callable[[str, str, list[list[int]], dict[str, Any]], dict[str, Any] | None]


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status; VmHWM is the most memory that was ever resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) * 1024


def run(package: str, quantize: Quantize) -> None:
    """Runs the job of the command line with `quantize` and writes what it took, or why it failed."""
    job = json.loads(Path(sys.argv[1]).read_text())
    result: dict[str, Any] = {"version": importlib.metadata.version(package)}
    result["base_bytes"] = status("VmRSS")
    wall, cpu = time.monotonic(), time.process_time()
    try:
        more = quantize(job["model"], job["out"], job["windows"], job["settings"])
        result.update(more or {})
    except Exception as error:  # whatever a tool refuses with belongs into the table
        traceback.print_exc()
        first = str(error).strip().split("\n", 1)[0][:300]
        result["error"] = f"{type(error).__name__}: {first}"
    result["seconds"] = round(time.monotonic() - wall, 2)
    result["cpu_seconds"] = round(time.process_time() - cpu, 2)
    result["peak_bytes"] = status("VmHWM")
    Path(sys.argv[2]).write_text(json.dumps(result))
