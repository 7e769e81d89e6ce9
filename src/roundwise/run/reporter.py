"""Reporter: shows the progress of a run, a bar that moves with each layer and a line for each block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from roundwise.checkpoint.manifest import LayerRecord
from roundwise.run.loop import Progress
from roundwise.system.console import Steps, count_of, format_seconds, steps


class Reporter:
    """Progress callback of a run: moves the bar with each layer and prints a line for each block."""

    def __init__(self, shown: Steps) -> None:
        self._shown = shown
        self._layers: list[LayerRecord] = []

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
        left = step.seconds_left
        parts = [label, self._errors(), "" if left is None else f"{format_seconds(left)} left"]
        self._shown.line("  ".join(part for part in parts if part))
        self._layers = []

    def _errors(self) -> str:
        """Returns the number of layers of a block, and their mean and largest relative error."""
        known = [
            (layer.relative_error, layer.name)
            for layer in self._layers
            if layer.relative_error is not None
        ]
        text = count_of(len(self._layers), "layer")
        if not known:
            return text
        largest, name = max(known)
        mean = sum(error for error, _ in known) / len(known)
        return f"{text}  error {mean:.1e}, max {largest:.1e} {name.rpartition('.')[2]}"


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
