"""`roundwise doctor`."""

from __future__ import annotations

from pathlib import Path

import roundwise as rw
from tests.cli.outputs import only_json
from tests.helpers import Commands


def test_json(commands: Commands) -> None:
    found = only_json(commands.run("doctor", "--json"))
    assert list(found) == [
        "roundwise", "python", "torch", "transformers", "native", "processor",
        "memory_available_bytes", "triton", "cuda",
    ]  # fmt: skip
    assert found["roundwise"] == rw.__version__
    assert found["native"].keys() == {"active", "reason"}
    assert found["processor"].keys() == {"name", "cores", "threads", "torch_uses"}
    assert found["processor"]["threads"] == 1


def test_words(commands: Commands) -> None:
    ended = commands.run("doctor")
    assert ended.code == 0
    lines = {line[:14].strip(): line[15:] for line in ended.stdout.splitlines()}
    assert lines["roundwise"] == rw.__version__
    assert ", 1 thread, torch uses " in lines["processor"]
    assert lines["memory"].endswith(" available")
    assert Path("/proc/meminfo").exists() or lines["memory"]
