"""A run repeated from its manifest: the same bytes, or a message about what differs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    OutputError,
    StrictError,
)
from roundwise.run import environment
from roundwise.run.reproduce import Reproduction, reproduce
from tests.helpers import contents, edited_json, windows

SETTINGS: dict[str, Any] = {
    "bits": 3, "group_size": 32, "sym": False, "desc_act": True, "damp_percent": 0.02, "refine": 2,
    "dynamic": {"layers.0.*k_proj": None, "down_proj": {"bits": 8}},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model; tests that change it restore it."""
    return Path(shutil.copytree(text_model, tmp_path_factory.mktemp("model") / "m"))


@pytest.fixture(scope="module")
def notes(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(text, tmp_path_factory.mktemp("notes") / "notes.txt"))


@pytest.fixture(scope="module")
def made(model: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    rw.quantize(
        model, out, rw.QuantizeConfig(**SETTINGS), notes,
        samples=3, seq_len=24, batch_size=1, seed=5, mode="block",
    )  # fmt: skip
    return out


def test_the_manifest_contains_everything_that_decides_the_bytes(
    model: Path, notes: Path, made: Path
) -> None:
    manifest = json.loads((made / "roundwise.json").read_text())
    run = manifest["run"]
    assert run["model"]["files"] == {"model.safetensors": contents(model)["model.safetensors"]}
    assert run["calibration"]["texts"][0][0] == "notes.txt"
    assert (run["calibration"]["seed"], run["calibration"]["batch_size"]) == (5, 1)
    assert run["config"].items() >= {k: v for k, v in SETTINGS.items() if k != "dynamic"}.items()
    assert run["versions"].keys() == {"roundwise", "torch", "transformers"}
    assert (run["threads"], run["mode"]) == (1, "block")
    assert run["processor"] == torch.backends.cpu.get_cpu_capability()
    assert run["solver"]
    assert manifest["given"] == {"model": str(model), "calibration": str(notes)}
    platform = manifest["platform"]
    assert platform["python"].startswith("CPython 3.")
    assert platform["libraries"].keys() == set(environment.LIBRARIES)
    assert {name: contents(made)[name] for name in manifest["files"]} == manifest["files"]


@pytest.mark.parametrize("name", ["", "roundwise.json"])
def test_a_repeated_run_gives_the_same_bytes(name: str, made: Path, tmp_path: Path) -> None:
    torch.set_num_threads(2)  # the number in the manifest is used
    try:
        repeated = reproduce(made / name, tmp_path / "again", strict=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert repeated.same
    assert repeated.platform == ""
    # All but the manifest itself, and the card, which may be written again.
    assert {*contents(made)} - {*repeated.files} == {"roundwise.json", "README.md"}
    assert contents(tmp_path / "again") == contents(made)


def test_rounding_to_nearest_needs_no_text(model: Path, tmp_path: Path) -> None:
    rw.quantize(model, tmp_path / "out", rw.QuantizeConfig(group_size=32, method="rtn"))
    assert reproduce(tmp_path / "out", tmp_path / "again").same


def test_model_and_text_that_have_moved(
    model: Path, notes: Path, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "moved")
    shutil.copy(notes, tmp_path / "notes.txt")
    manifest = tmp_path / "roundwise.json"
    shutil.copy(made / "roundwise.json", manifest)
    with edited_json(manifest) as record:
        record["given"] = {"model": str(tmp_path / "gone"), "calibration": "gone.txt"}
    with pytest.raises(CheckpointError, match=r"there is no folder .*gone"):
        reproduce(manifest, tmp_path / "again")
    with pytest.raises(CalibrationError, match=r"there is no file 'gone\.txt'"):
        reproduce(manifest, tmp_path / "again", model=str(tmp_path / "moved"))
    moved = {"model": str(tmp_path / "moved"), "calibration": str(tmp_path / "notes.txt")}
    assert reproduce(manifest, tmp_path / "again", **moved).same


class TestRefused:
    """Whatever differs from the manifest is reported before work begins."""

    def refused(self, made: Path, tmp_path: Path, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            reproduce(made, tmp_path / "again")
        assert not (tmp_path / "again").exists()

    @pytest.mark.parametrize("keep_time", [False, True])
    def test_other_weights(self, keep_time: bool, model: Path, made: Path, tmp_path: Path) -> None:
        file = model / "model.safetensors"
        before, times = file.read_bytes(), file.stat()
        data = bytearray(before)
        data[-1] ^= 1
        file.write_bytes(data)
        if keep_time:
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        try:
            message = (
                rf"{model.name} is not the model that .* was made from: model\.safetensors differs"
            )
            self.refused(made, tmp_path, CheckpointError, message)
        finally:
            file.write_bytes(before)

    def test_another_config(self, model: Path, made: Path, tmp_path: Path) -> None:
        before = (model / "config.json").read_text()
        with edited_json(model / "config.json") as config:
            config["rms_norm_eps"] = 1e-4
        try:
            self.refused(made, tmp_path, CheckpointError, r"made from: config\.json differs")
        finally:
            (model / "config.json").write_text(before)

    def test_another_text(self, notes: Path, made: Path, tmp_path: Path) -> None:
        before = notes.read_text()
        notes.write_text(before + "!")
        try:
            message = r"notes\.txt is not the text that .* was calibrated with"
            self.refused(made, tmp_path, CalibrationError, message)
        finally:
            notes.write_text(before)

    def test_another_tokenizer(self, model: Path, made: Path, tmp_path: Path) -> None:
        before = (model / "tokenizer.json").read_text()
        with edited_json(model / "tokenizer.json") as tokenizer:
            tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:50]
        try:
            self.refused(made, tmp_path, CalibrationError, "is the tokenizer another one?")
        finally:
            (model / "tokenizer.json").write_text(before)

    def test_a_folder_without_a_manifest(self, model: Path, tmp_path: Path) -> None:
        self.refused(model, tmp_path, CheckpointError, "only checkpoints made by roundwise")

    def test_the_manifests_own_folder_as_output(self, made: Path) -> None:
        with pytest.raises(OutputError, match="is the checkpoint to compare with"):
            reproduce(made, made)

    def test_a_python_list(self, model: Path, tmp_path: Path) -> None:
        config = rw.QuantizeConfig(group_size=32, recipe="textbook")
        rw.quantize(model, tmp_path / "out", config, windows(), samples=4, seq_len=32)
        self.refused(tmp_path / "out", tmp_path, CheckpointError, "calibrated with a Python list")

    @pytest.mark.parametrize(
        ("part", "value", "kind"),
        [
            ("threads", 0, CheckpointError), ("threads", "x", CheckpointError),
            ("config", [], CheckpointError), ("calibration", {}, CheckpointError),
            ("mode", "fast", CheckpointError), ("model", {"files": 3}, CheckpointError),
        ],
    )  # fmt: skip
    def test_a_damaged_manifest(
        self, part: str, value: Any, kind: type[Exception], made: Path, tmp_path: Path
    ) -> None:
        shutil.copy(made / "roundwise.json", tmp_path / "m.json")
        with edited_json(tmp_path / "m.json") as record:
            record["run"][part] = value
        self.refused(
            tmp_path / "m.json", tmp_path, kind, r"m\.json (does not say how to do it|is damaged)"
        )

    def test_settings_of_another_version(self, made: Path, tmp_path: Path) -> None:
        shutil.copy(made / "roundwise.json", tmp_path / "m.json")
        with edited_json(tmp_path / "m.json") as record:
            record["run"]["config"]["levels"] = 3
        self.refused(tmp_path / "m.json", tmp_path, ConfigError, "there is no setting 'levels'")


class TestElsewhere:
    """Another version or processor is reported, and the files are compared."""

    @pytest.fixture
    def other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("roundwise.run.environment.__version__", "99")

    @pytest.mark.usefixtures("other")
    def test_it_is_reported(self, made: Path, tmp_path: Path) -> None:
        repeated = reproduce(made, tmp_path / "again")
        assert any(
            "versions.roundwise" in line and "the bytes may differ" in line
            for line in repeated.result.not_as_asked
        )
        assert repeated.same  # only the manifest, which is not compared, contains the version

    @pytest.mark.usefixtures("other")
    def test_it_is_an_error_if_strict(self, made: Path, tmp_path: Path) -> None:
        with pytest.raises(StrictError, match=r"versions\.roundwise"):
            reproduce(made, tmp_path / "again", strict=True)
        assert not (tmp_path / "again").exists()

    def test_another_file_of_the_model(self, model: Path, made: Path, tmp_path: Path) -> None:
        (model / "NOTICE").write_text("new")
        try:
            repeated: Reproduction = reproduce(made, tmp_path / "again")
        finally:
            (model / "NOTICE").unlink()
        assert not repeated.same
        assert [name for name, same in repeated.files.items() if not same] == ["NOTICE"]
