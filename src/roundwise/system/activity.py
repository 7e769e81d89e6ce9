"""Says what the program is doing, for whoever shows it: a progress bar, a log, a notebook.

Work announces itself by name, with how far it is where that is known. Each name is one INFO line of the
logger "roundwise"; steps inside it go to listeners only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with the name of the work, the finished steps, and all steps (0: their number is not known).
Listener = Callable[[str, int, int], None]

logger = logging.getLogger("roundwise")
logger.addHandler(logging.NullHandler())  # a library prints nothing unless it is asked to
_listeners: list[Listener] = []
_current: list[str] = [""]


def announce(work: str, done: int = 0, total: int = 0) -> None:
    """Says what is being done from now on, or how far it is.

    Args:
        work: name of the work, such as "opening the model".
        done: finished steps.
        total: all steps; 0: not known.
    """
    if work != _current[0]:
        _current[0] = work
        logger.info("%s", work)
    for listener in _listeners:
        listener(work, done, total)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Context manager: `listener` is called with every announcement inside."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
        _current[0] = ""
