"""Optional parts are installed by name once the package is on an index, before that from its folder."""

from __future__ import annotations

import pytest

from roundwise import version


@pytest.mark.parametrize(
    ("on_index", "command"),
    [
        (True, "pip install 'roundwise[serve]'"),
        (False, "pip install '.[serve]' in its source folder"),
    ],
)
def test_the_command(on_index: bool, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "ON_INDEX", on_index)
    assert version.install_command("serve") == command
