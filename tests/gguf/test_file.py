"""GGUF files are written like their template; damaged ones get one sentence."""

import builtins
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from roundwise.errors import CheckpointError, ConfigError, StorageError
from roundwise.gguf.file import GgufFile, PlannedTensor, fits_type, quantize_values
from tests.gguf.templates import read_gguf, write_template


@pytest.fixture(scope="session")
def template(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_template(llama, tmp_path_factory.mktemp("template") / "f16.gguf")


def fields(path: Path) -> dict[str, object]:
    return {
        name: field.contents()
        for name, field in gguf.GGUFReader(path).fields.items()
        if not name.startswith("GGUF.")
    }


def unchanged(file: GgufFile) -> list[PlannedTensor]:
    return [
        PlannedTensor(t.name, t.type, t.shape, lambda t=t: t.stored) for t in file.tensors.values()
    ]


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_a_copy_has_the_same_metadata_and_tensors(kind, llama, tmp_path):
    file = GgufFile(write_template(llama, tmp_path / "template.gguf", kind))
    assert all(torch.isfinite(tensor.values()).all() for tensor in file.tensors.values())
    file.write_like(tmp_path / "copy.gguf", unchanged(file), "Q4_0")
    before, after = fields(file.path), fields(tmp_path / "copy.gguf")
    assert after.pop("general.file_type") == int(gguf.LlamaFileType.MOSTLY_Q4_0)
    assert after.pop("general.quantization_version") == gguf.GGML_QUANT_VERSION
    assert after.pop("general.quantized_by") == "roundwise"
    del before["general.file_type"]
    assert after == before
    one, two = read_gguf(file.path), read_gguf(tmp_path / "copy.gguf")
    assert [*one] == [*two]
    for name, (stored_as, values) in one.items():
        assert two[name][0] == stored_as
        np.testing.assert_array_equal(two[name][1], values)


def test_arrays_and_alignment_are_kept(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(128)
    writer.add_array("words", ["one", "zwölf"])
    writer.add_array("numbers", [0.5, 1.5])
    writer.add_tensor("w", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "a.gguf")
    file.write_like(tmp_path / "b.gguf", unchanged(file), "F32")
    again = fields(tmp_path / "b.gguf")
    assert again["words"] == ["one", "zwölf"] and again["numbers"] == [0.5, 1.5]
    assert again["general.alignment"] == 128
    assert all(t.data_offset % 128 == 0 for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors)


@pytest.mark.parametrize("size", [0, 3, 30, 200, 1500, -1])
def test_damaged_files_are_refused_in_one_sentence(size, template, tmp_path):
    data = template.read_bytes()[:size]
    (tmp_path / "cut.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read as a GGUF file"):
        GgufFile(tmp_path / "cut.gguf")


def test_other_files_are_refused(llama, tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        GgufFile(tmp_path / "missing.gguf")
    shutil.copy(llama / "model.safetensors", tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="cannot be read as a GGUF file"):
        GgufFile(tmp_path / "model.gguf")
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("w", np.zeros((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="one of 3 parts: join them"):
        GgufFile(tmp_path / "part.gguf")


def test_without_the_package_the_message_says_how_to_install_it(template, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install '\.\[gguf\]'"):
        GgufFile(template)


def test_a_failed_write_leaves_no_file(template, tmp_path):
    file = GgufFile(template)

    def fail() -> torch.Tensor:
        raise OSError(28, "No space left on device")

    tensors = unchanged(file)
    tensors[-1] = PlannedTensor(tensors[-1].name, tensors[-1].type, tensors[-1].shape, fail)
    with pytest.raises(StorageError, match="the disk is full"):
        file.write_like(tmp_path / "out.gguf", tensors, "F16")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_rows_are_quantized_as_the_package_does(kind, monkeypatch):
    monkeypatch.setattr("roundwise.gguf.file.ROWS", 3)
    values = torch.randn(8, 64)
    stored = quantize_values(values, kind)
    expected = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind])
    assert stored.numpy().tobytes() == expected.tobytes()


def test_rows_must_be_whole_blocks():
    assert fits_type("Q8_0", 64) and not fits_type("Q8_0", 48) and fits_type("F16", 48)
