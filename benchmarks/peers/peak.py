"""Peak memory of a process, for scripts that also run in environments without roundwise."""

from pathlib import Path


def peak() -> int:
    """Returns the peak resident bytes of this process."""
    with Path("/proc/self/status").open(encoding="ascii") as lines:
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
