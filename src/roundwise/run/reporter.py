"""Reporter: shows the progress of a run, a bar that moves with each layer and a line for each block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from roundwise.checkpoint.manifest import LayerRecord
from roundwise.run.loop import Progress
from roundwise.system.console import Steps, format_seconds, steps

#: Longest name of a layer in a line.
MAX_NAME = 20


class Reporter:
    """Progress callback of a run: moves the bar with each layer and prints a line for each block."""

    def __init__(self, shown: Steps) -> None:
        self._shown = shown
        self._layers: list[LayerRecord] = []
        self._has_header = False

    def __call__(self, step: Progress) -> None:
        """Shows one step of the run: a layer, or a finished block."""
        self._shown.time_left(step.seconds_left)
        finished = (step.block + (step.layer is None) - step.resumed) / (step.blocks - step.resumed)
        label = f"block {min(step.block + 1, step.blocks)}/{step.blocks}"
        if step.layer is not None:
            self._layers.append(step.layer)
            self._shown.update(finished, f"{label} {step.layer.name.rpartition('.')[2]}")
            return
        self._shown.update(finished, label)
        errors = self._errors()
        if errors and not self._has_header:
            self._shown.line(
                _row("block", "layers", "mean error", "largest error, layer", "time left")
            )
            self._has_header = True
        left = "" if step.seconds_left is None else format_seconds(step.seconds_left)
        self._shown.line(_row(label, str(len(self._layers)), *(errors or ("", "")), left))
        self._layers = []

    def _errors(self) -> tuple[str, str] | None:
        """Returns the mean relative output error of a block's layers, and the largest with its layer."""
        known = [
            (layer.relative_error, layer.name)
            for layer in self._layers
            if layer.relative_error is not None
        ]
        if not known:
            return None
        largest, name = max(known)
        mean = sum(error for error, _ in known) / len(known)
        return f"{mean:.1e}", f"{largest:.1e} {name.rpartition('.')[2][-MAX_NAME:]}"


def _row(block: str, layers: str, error: str, largest: str, left: str) -> str:
    """Returns a line of the table of blocks, of less than 80 characters."""
    return f"{block:13} {layers:>6}  {error:10}  {largest:28} {left:>9}".rstrip()


@contextmanager
def reporting(
    progress: Callable[[Progress], None] | bool | None,
) -> Iterator[Callable[[Progress], None] | None]:
    """Context manager: the callback that a run reports to.

    Args:
        progress: a callback; True: shows the progress on stderr, or in a notebook; None: nothing.
    """
    if progress is True:
        with steps("quantizing") as display:
            yield Reporter(display)
    else:
        yield progress or None
