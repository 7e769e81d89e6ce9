"""Common part of every `run_TOOL.py`: runs one job and records its time and peak memory.

    python run_TOOL.py JOB.json RESULT.json

Each tool's own interpreter runs it, so it uses only the standard library, not roundwise. The job
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

#: Quantizes (model, out, windows, settings); entries that it returns are added to the result.
Quantize = Callable[[str, str, list[list[int]], dict[str, Any]], dict[str, Any] | None]


def status(field: str) -> int:
    """Returns a field of /proc/self/status in bytes; VmHWM is the peak resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) * 1024


def run(package: str, quantize: Quantize) -> None:
    """Runs the job of the command line with `quantize` and writes its cost, or why it failed."""
    job = json.loads(Path(sys.argv[1]).read_text())
    result: dict[str, Any] = {"version": importlib.metadata.version(package)}
    result["base_bytes"] = status("VmRSS")
    wall, cpu = time.monotonic(), time.process_time()
    try:
        entries = quantize(job["model"], job["out"], job["windows"], job["settings"])
        result.update(entries or {})
    except Exception as error:  # any refusal of a tool is a result
        traceback.print_exc()
        first_line = str(error).strip().split("\n", 1)[0][:300]
        result["error"] = f"{type(error).__name__}: {first_line}"
    result["seconds"] = round(time.monotonic() - wall, 2)
    result["cpu_seconds"] = round(time.process_time() - cpu, 2)
    result["peak_bytes"] = status("VmHWM")
    Path(sys.argv[2]).write_text(json.dumps(result))
