"""Records of a run: written and read as JSON, read by key, refused when they are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from roundwise.checkpoint.manifest import (
    MANIFEST,
    RUN,
    BlockRecord,
    Fingerprint,
    LayerRecord,
    Manifest,
    Shard,
    find_record,
    read_manifest,
    read_run,
    validation_error,
)
from roundwise.checkpoint.side_files import changed_files
from roundwise.checkpoint.untrusted import file_digest
from roundwise.errors import CheckpointError

LAYER: dict[str, Any] = {
    "name": "layers.0.q", "bits": 4, "group_size": 128, "relative_error": 0.01,
    "weight_error": 0.02, "damp_percent": 0.01, "damp_tried": [0.01], "tokens": 64, "fallback": None,
}  # fmt: skip


def layer(**changes: Any) -> LayerRecord:
    return LayerRecord(**{**LAYER, **changes})


def test_records_are_found_under_the_names_that_files_have() -> None:
    records = {name: layer(name=name) for name in ("model.10.q", "model.0.q", "head")}
    assert find_record(records, "head") is records["head"]
    assert find_record(records, "0.q") is records["model.0.q"]
    assert find_record(records, "1.q") is None


def test_only_fields_that_were_set_are_written() -> None:
    assert layer().as_json() == LAYER
    assert layer(confirmed_drift=0.5).as_json() == {**LAYER, "confirmed_drift": 0.5}
    record = layer(confirmed_drift=0.25, gradients=7)
    assert LayerRecord.model_validate(json.loads(json.dumps(record.as_json()))) == record


def test_records_can_be_read_like_dicts() -> None:
    record = layer(confirmed_drift=0.5)
    assert record["bits"] == record.bits == 4
    assert dict(record) == {**LAYER, "confirmed_drift": 0.5}
    assert "confirmed_drift" in record and "gradients" not in record
    assert record.get("gradients", "none") == "none"
    assert record.get("confirmed_drift", "none") == 0.5
    with pytest.raises(KeyError, match="gradients"):
        record["gradients"]


def test_unknown_keys_are_kept() -> None:
    record = Fingerprint.model_validate({"threads": 2, "future": [1]})
    assert record.as_json() == {"threads": 2, "future": [1]}
    assert record["future"] == [1]


def test_records_are_frozen() -> None:
    with pytest.raises(ValidationError):
        layer().bits = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (LayerRecord, {**LAYER, "bits": "4"}, "bits: Input should be a valid integer"),
        (LayerRecord, {k: v for k, v in LAYER.items() if k != "tokens"}, "tokens: Field required"),
        (LayerRecord, [], "it: Input should be a valid dictionary or instance of LayerRecord"),
        (
            list[LayerRecord],
            [LAYER, {**LAYER, "name": 7}],
            "1.name: Input should be a valid string",
        ),
        (Fingerprint, {"threads": 0}, "threads: Input should be greater than or equal to 1"),
        (
            Fingerprint,
            {"mode": "fast"},
            "mode: Input should be 'true_sequential', 'block' or 'none'",
        ),
    ],
)
def test_damaged_records_are_refused_with_the_place(kind: Any, value: Any, message: str) -> None:
    assert validation_error(kind, value) == message


def test_valid_records_have_no_error() -> None:
    assert validation_error(LayerRecord, LAYER) is None


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "", "..", "a\0b"])
def test_files_outside_of_the_folder_are_refused(name: str) -> None:
    shard = {"name": name, "blocks": [0], "others": []}
    assert "is not in the folder" in str(validation_error(Shard, shard))
    assert validation_error(Shard, {**shard, "name": "x.safetensors"}) is None


def test_a_block_in_the_manifest_is_a_summary() -> None:
    block = BlockRecord(
        block=0, sha256="0", nbytes=1, activations=None, layers=[layer()], experts={}, seconds={},
        name="layers.0", depth_error=0.5,
    )  # fmt: skip
    assert block.summary().as_json() == {"name": "layers.0", "depth_error": 0.5}


class TestFiles:
    def test_the_manifest_of_a_run(self, quantized: Callable[..., Path]) -> None:
        folder = quantized("llama", recipe="textbook")
        manifest = read_manifest(folder)
        assert manifest == read_manifest(folder / MANIFEST)
        assert manifest is not None
        assert manifest.as_json() == json.loads((folder / MANIFEST).read_text())
        assert len(manifest.layers) == 14
        run = read_run(folder)
        assert run is not None and run.seconds == pytest.approx(sum(run.phases.values()))

    def test_a_checkpoint_of_another_tool(self, llama: Path) -> None:
        assert read_manifest(llama) is read_run(llama) is None

    @pytest.mark.parametrize("name", [MANIFEST, RUN])
    @pytest.mark.parametrize("text", ["{", "[]", '{"seconds": "1", "run": 3}'])
    def test_a_damaged_file(self, name: str, text: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(text)
        read = read_manifest if name == MANIFEST else read_run
        with pytest.raises(CheckpointError, match=name):
            read(tmp_path)

    def test_a_damaged_layer_is_named(self, quantized: Callable[..., Path], tmp_path: Path) -> None:
        value = json.loads((quantized("llama", recipe="textbook") / MANIFEST).read_text())
        value["layers"][3]["bits"] = None
        (tmp_path / MANIFEST).write_text(json.dumps(value))
        with pytest.raises(CheckpointError, match=r"roundwise\.json is damaged: layers\.3\.bits: "):
            read_manifest(tmp_path)
        assert validation_error(Manifest, value) is not None

    def test_changed_and_missing_files(self, tmp_path: Path) -> None:
        for name in ("a", "b", "config.json.draft"):
            (tmp_path / name).write_text(name)
        files = {
            "a": file_digest(tmp_path / "a"), "b": "0", "c": "0",
            "config.json": file_digest(tmp_path / "config.json.draft"),
        }  # fmt: skip
        changed = changed_files(tmp_path, files, "config.json.draft")
        assert (changed.evidence, changed.notes) == (("c is missing",), ("b was changed",))
        assert changed_files(tmp_path, files).evidence[-1] == "config.json is missing"

    def test_weights_and_configs_are_evidence(self, tmp_path: Path) -> None:
        names = ["config.json", "quantize_config.json", "m.safetensors", "m.safetensors.index.json"]
        notes = ["tokenizer.json", "2_Dense/model.safetensors", "generation_config.json"]
        (tmp_path / "2_Dense").mkdir()
        for name in [*names, *notes]:
            (tmp_path / name).write_text(name)
        changed = changed_files(tmp_path, dict.fromkeys([*names, *notes], "0"))
        assert changed.evidence == tuple(f"{name} was changed" for name in names)
        assert changed.notes == tuple(f"{name} was changed" for name in notes)
