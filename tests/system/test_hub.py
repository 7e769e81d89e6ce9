"""Model folders: local paths, ids on the hub, and the model that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from roundwise.checkpoint.reader import Checkpoint
from roundwise.errors import CheckpointError
from roundwise.system import hub
from roundwise.system.hub import bundled_model, local_folder


def test_the_bundled_model_is_complete() -> None:
    folder = bundled_model()
    assert Checkpoint(folder).config["model_type"] == "llama"
    assert (folder / "tokenizer.json").is_file()


def test_a_missing_bundled_model_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "src" / "roundwise" / "x" / "hub.py"))
    with pytest.raises(CheckpointError, match="reinstall roundwise"):
        bundled_model()


def test_an_existing_path_is_not_looked_up_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.setattr(hub, "snapshot_download", None)
    assert local_folder("owner/name") == Path("owner/name")


def test_an_id_is_downloaded_without_pickled_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[str, list[str]]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        calls.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert local_folder("owner/some-model_1.5") == tmp_path
    ((name, patterns),) = calls
    assert name == "owner/some-model_1.5"
    assert "*.safetensors" in patterns
    assert not any(Path(name).match(p) for p in patterns for name in ("a.bin", "a.pt", "a.h5"))


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "owner/", "../owner/name"])
def test_a_name_that_is_neither_a_folder_nor_an_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a model id of the form owner/name"):
        local_folder(name)


def test_a_failed_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError("no network\nlong help")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as error:
        local_folder("owner/name")
    expected = "owner/name is not a local folder and cannot be downloaded: no network"
    assert str(error.value) == expected
