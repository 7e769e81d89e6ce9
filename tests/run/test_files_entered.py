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
from tests.helpers import Stop

PACKAGE = Path(rw.__file__).parent
#: Most files that solving one group of layers may enter, from one layer's record to the next.
MOST = 21


#: Layers of the second block, each of another group.
LAYERS = ("1.self_attn.o_proj", "1.mlp.gate_proj", "1.mlp.down_proj")


def files_entered(run: Callable[[Callable[[Progress], None]], Any]) -> dict[str, set[str]]:
    """Files of the package that are entered from one layer's record to the next, for `LAYERS`.

    Args:
        run: quantizes with the progress callback that it is given.
    """
    entered: set[str] = set()
    counted: dict[str, set[str]] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE):
            entered.add(str(file.relative_to(PACKAGE)))

    def progress(reached: Progress) -> None:
        name = reached.layer.name if reached.layer is not None else ""
        counted.update({layer: {*entered} for layer in LAYERS if name.endswith(layer)})
        entered.clear()
        if len(counted) == len(LAYERS):
            raise Stop  # without what is entered while the run ends

    before = greenlet.gettrace()
    # Each greenlet has a profile function of its own.
    greenlet.settrace(lambda *_: sys.setprofile(profile))
    sys.setprofile(profile)
    try:
        with pytest.raises(Stop):
            run(progress)
    finally:
        sys.setprofile(None)
        greenlet.settrace(before)
    return counted


def test_solving_one_group_enters_few_files(tiny: Path, text: Path, tmp_path: Path) -> None:
    def run(progress: Callable[[Progress], None]) -> None:
        rw.quantize(
            tiny, tmp_path / "out", rw.QuantizeConfig(group_size=64), str(text),
            samples=8, seq_len=128, batch_size=4, progress=progress,
        )  # fmt: skip

    for layer, entered in files_entered(run).items():
        assert "core/rounding.py" in entered, layer
        assert len(entered) <= MOST, " ".join([layer, *sorted(entered)])
