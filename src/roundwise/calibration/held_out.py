"""Held-out batches: calibration text that the correction for earlier layers is not fitted to.

It says which part of the correction is more than noise (`core.drift`). Then it is used like all other
text.
"""

from __future__ import annotations

from roundwise.config import QuantizeConfig

#: One of this many batches is held out.
EVERY = 8


def windows_per_batch(samples: int, batch_size: int) -> int:
    """Returns how many windows make a batch, so that one of eight batches can be held out.

    Args:
        samples: number of windows.
        batch_size: most windows of a batch.
    """
    return max(1, min(batch_size, samples // EVERY))


def held_out_batches(config: QuantizeConfig, batches: int) -> frozenset[int]:
    """Returns the numbers of the batches to hold out; none if nothing is corrected, or of one batch.

    Args:
        config: settings.
        batches: number of calibration batches.
    """
    if not config.needs_reference or batches < 2:
        return frozenset()
    return frozenset(range(EVERY - 1, batches, EVERY)) or frozenset([batches - 1])
