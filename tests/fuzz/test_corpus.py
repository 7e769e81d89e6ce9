"""Every input that once broke something, and a sound one for each target: a RoundwiseError, or success.

In a process of its own, under the fuzzer's bounds on time and memory.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.run import CORPUS, MEMORY

REPLAY = """
import faulthandler, sys
from pathlib import Path
from tests.fuzz.run import CORPUS, SECONDS, bound_memory
from tests.fuzz.targets import Targets

targets = Targets(Path(sys.argv[1]))
bound_memory()
for target in sorted(targets.all()):
    inputs = {file: file.read_bytes() for file in sorted((CORPUS / target).iterdir())}
    assert inputs, target
    for place, data in [(target, targets.seed(target)), *inputs.items()]:
        print(place, flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)  # even out of a loop in C
        targets.run(target, data)
        faulthandler.cancel_dump_traceback_later()
print("done")
"""


@pytest.mark.slow
def test_every_input_kept_ends_well_or_in_an_error_of_ours(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REPLAY, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    said = ended.stdout.splitlines()
    assert ended.returncode == 0, f"{said[-1:]}: {ended.stderr[-2000:]}"
    assert said[-1] == "done"
    assert len(said) > len([file for file in CORPUS.rglob("*") if file.is_file()])


def test_the_bounds_are_real(tmp_path: Path) -> None:
    code = "import faulthandler; from tests.fuzz.run import bound_memory; bound_memory()\n"
    taken = subprocess.run(
        [sys.executable, "-c", f"{code}bytes({MEMORY + (1 << 20)})"], capture_output=True, text=True
    )
    assert "MemoryError" in taken.stderr
