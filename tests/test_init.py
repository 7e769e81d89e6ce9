"""The names of the package."""

from __future__ import annotations

import roundwise as rw


def test_dir_lists_the_public_names() -> None:
    assert {*dir(rw)} == {*rw.__all__, "__version__"}
    for name in dir(rw):
        assert getattr(rw, name) is not None
