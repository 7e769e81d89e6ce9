"""How many files the code of one step is spread over: a reader has to open them all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import greenlet
import pytest

import roundwise as rw
from roundwise.run.api import Progress

PACKAGE = Path(rw.__file__).parent
#: Most files that solving one group of layers may enter, from one layer's record to the next.
MOST = 20


class Finished(Exception):
    """Ends a run that has shown enough."""


def files_entered(layer: str, run: Callable[[Callable[[Progress], None]], Any]) -> set[str]:
    """Files of the package that are entered between the record before that of `layer` and its own.

    Args:
        layer: end of its name.
        run: quantizes with the progress callback that it is given.
    """
    entered: set[str] = set()
    counted: set[str] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE):
            entered.add(str(file.relative_to(PACKAGE)))

    def progress(reached: Progress) -> None:
        if reached.layer is not None and reached.layer.name.endswith(layer):
            counted.update(entered)  # without what is entered while the run ends
            raise Finished
        entered.clear()

    before = greenlet.gettrace()
    # Each greenlet has a profile function of its own.
    greenlet.settrace(lambda *_: sys.setprofile(profile))
    sys.setprofile(profile)
    try:
        with pytest.raises(Finished):
            run(progress)
    finally:
        sys.setprofile(None)
        greenlet.settrace(before)
    return counted


@pytest.mark.parametrize("layer", ["1.self_attn.o_proj", "1.mlp.gate_proj", "1.mlp.down_proj"])
def test_solving_one_group_enters_few_files(
    layer: str, tiny: Path, text: Path, tmp_path: Path
) -> None:
    def run(progress: Callable[[Progress], None]) -> None:
        rw.quantize(
            tiny, tmp_path / "out", rw.QuantizeConfig(group_size=64), str(text),
            samples=8, seq_len=128, batch_size=4, progress=progress,
        )  # fmt: skip

    entered = files_entered(layer, run)
    assert "core/rounding.py" in entered
    assert len(entered) <= MOST, sorted(entered)
