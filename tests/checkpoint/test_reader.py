"""Tensors are read one by one, with the same values as the safetensors library reads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from roundwise.checkpoint.reader import DTYPES, Checkpoint, CheckpointView, read_header
from roundwise.errors import CheckpointError
from tests.helpers import raw, tensors_of

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@DTYPE
def test_every_dtype_is_read_as_it_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(24).reshape(4, 6) % 2
    # One byte first, so that the next tensor begins at an odd offset.
    tensors = {"a": torch.ones(1, dtype=torch.uint8), "b": values.to(dtype), "c": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors")
    infos = read_header(tmp_path / "x.safetensors")
    assert set(infos) == set(tensors)
    for name, tensor in tensors.items():
        read = infos[name].read()
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert raw(read) == raw(tensor) == b"".join(infos[name].chunks())


def test_a_tensor_at_an_odd_offset(tmp_path: Path) -> None:
    # The format allows it, though its own library sorts tensors so that it does not happen.
    values = torch.arange(5, dtype=torch.float32)
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "float": {"dtype": "F32", "shape": [5], "data_offsets": [3, 23]},
    }
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + b"abc" + values.numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(data)
    assert torch.equal(read_header(tmp_path / "x.safetensors")["float"].read(), values)


def test_writing_to_a_tensor_does_not_change_the_file(llama: Path) -> None:
    before = (llama / "model.safetensors").read_bytes()
    tensor = Checkpoint(llama).tensors["model.norm.weight"].read()
    tensor.zero_()
    assert (llama / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("change", ["cut", "removed"])
def test_a_file_that_was_changed_after_opening_is_refused(change: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(10_000), "b": torch.ones(10_000)}, tmp_path / "x.safetensors")
    infos = read_header(tmp_path / "x.safetensors")
    if change == "cut":
        os.truncate(tmp_path / "x.safetensors", 200)
    else:
        (tmp_path / "x.safetensors").unlink()
    for info in infos.values():
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            info.read()
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            list(info.chunks())


def test_all_tensors_of_a_checkpoint(llama: Path) -> None:
    expected = tensors_of(llama)
    tensors = Checkpoint(llama).tensors
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(info.read(), expected[name]) for name, info in tensors.items())


def test_rows_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    tensor = torch.randn(6, 3, 2)
    save_file({"a": torch.ones(1, dtype=torch.uint8), "b": tensor}, tmp_path / "x.safetensors")
    rows = read_header(tmp_path / "x.safetensors")["b"].rows(2, 3)
    assert (rows.shape, rows.nbytes) == ((3, 3, 2), 3 * 6 * 4)
    assert torch.equal(rows.read(), tensor[2:5])


def test_a_view_shows_other_tensors_but_is_the_same_model(llama: Path) -> None:
    source = Checkpoint(llama)
    name = "model.norm.weight"
    view = CheckpointView(source, {"renamed": source.tensors[name]}, {"other": 1})
    assert torch.equal(view.tensors["renamed"].read(), source.tensors[name].read())
    assert (view.config, CheckpointView(source, {}).config) == ({"other": 1}, source.config)
    assert (view.nbytes(), view.identity()) == (source.nbytes(), source.identity())


def test_a_tensor_in_two_files_is_refused(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    names = list(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({names[0]: tensors[names[0]]}, tmp_path / "b.safetensors")
    index = {"weight_map": {names[0]: "a.safetensors", names[1]: "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is both in a\.safetensors and b\.safetensors"):
        Checkpoint(tmp_path)


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has 2 safetensors files and no model\.saf"):
        Checkpoint(tmp_path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no tensors"):
        Checkpoint(tmp_path)


def test_side_files_are_everything_but_weights(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    kept = ["LICENSE", "README.md", "chat_template.jinja", "generation_config.json", "merges.txt"]
    excluded = [
        "config.json",
        "model.bin",
        "tf_model.h5",
        "x.gguf",
        ".git",
        "pytorch_model.bin.index.json",
    ]
    for name in [*kept, *excluded]:
        (tmp_path / name).write_text("{}")
    (tmp_path / "folder").mkdir()
    assert [path.name for path in Checkpoint(tmp_path).side_files()] == kept


class TestLinks:
    """Links to files of the same folder or the hub's cache are allowed, all others are refused."""

    @pytest.fixture
    def folder(self, llama: Path, tmp_path: Path) -> Path:
        shutil.copytree(llama, tmp_path / "model")
        (tmp_path / "secret.txt").write_text("mine")
        return tmp_path / "model"

    @pytest.mark.parametrize(
        "name", ["config.json", "model.safetensors", "generation_config.json", "LICENSE"]
    )
    @pytest.mark.parametrize("absolute", [True, False])
    def test_a_link_out_of_the_folder(
        self, name: str, absolute: bool, folder: Path, tmp_path: Path
    ) -> None:
        if (folder / name).exists():
            (folder / name).rename(tmp_path / name)
        else:
            (tmp_path / name).write_text("mine")
        (folder / name).symlink_to(tmp_path / name if absolute else f"../{name}")
        with pytest.raises(CheckpointError, match=rf"{name} is a link to .*, outside the folder"):
            Checkpoint(folder)

    def test_links_that_are_not_read_are_ignored(self, folder: Path, tmp_path: Path) -> None:
        (folder / ".git").symlink_to(tmp_path)
        (folder / "pytorch_model.bin").symlink_to(tmp_path / "secret.txt")
        (folder / "original").symlink_to(tmp_path)
        assert all(not file.is_symlink() for file in Checkpoint(folder).side_files())

    def test_a_link_within_the_folder(self, folder: Path) -> None:
        (folder / "COPYING").symlink_to("generation_config.json")
        assert folder / "COPYING" in Checkpoint(folder).side_files()

    def test_a_folder_that_is_a_link(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(folder)
        assert Checkpoint(tmp_path / "link").tensors.keys() == Checkpoint(folder).tensors.keys()

    @pytest.mark.parametrize("through_link", [False, True])
    def test_the_cache_of_the_hub(self, through_link: bool, folder: Path, tmp_path: Path) -> None:
        # models--owner--name/snapshots/REVISION/file -> ../../blobs/HASH
        cache = tmp_path / "models--owner--name"
        snapshot = cache / "snapshots" / "0123abc"
        snapshot.mkdir(parents=True)
        (cache / "blobs").mkdir()
        for number, file in enumerate(sorted(folder.iterdir())):
            file.rename(cache / "blobs" / str(number))
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        if through_link:
            (tmp_path / "link").symlink_to(snapshot)
        checkpoint = Checkpoint(tmp_path / "link" if through_link else snapshot)
        assert checkpoint.tensors
        assert [file.name for file in checkpoint.side_files()] == ["generation_config.json"]
        # In the cache, too, a link must not leave it.
        (snapshot / "LICENSE").symlink_to(tmp_path / "secret.txt")
        with pytest.raises(CheckpointError, match="LICENSE is a link"):
            Checkpoint(snapshot)

    def test_a_cache_whose_blobs_are_a_link(self, folder: Path, tmp_path: Path) -> None:
        snapshot = tmp_path / "x" / "snapshots" / "model"
        snapshot.parent.mkdir(parents=True)
        folder.rename(snapshot)
        (tmp_path / "x" / "blobs").symlink_to(tmp_path)
        (snapshot / "LICENSE").symlink_to("../../blobs/secret.txt")
        with pytest.raises(CheckpointError, match="LICENSE is a link"):
            Checkpoint(snapshot)

    def test_a_link_to_itself(self, folder: Path) -> None:
        (folder / "LICENSE").symlink_to("LICENSE")
        assert Checkpoint(folder).tensors  # such a link is not a file
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to("config.json")
        with pytest.raises(CheckpointError, match=r"config\.json"):
            Checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "LICENSE"]
)
def test_a_named_pipe_is_not_a_file(name: str, llama: Path, tmp_path: Path) -> None:
    # Opening one would block forever.
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "model" / name)
    if name in ("config.json", "model.safetensors"):
        with pytest.raises(CheckpointError, match="has no "):
            Checkpoint(tmp_path / "model")
    else:
        assert Checkpoint(tmp_path / "model").tensors


class TestIdentity:
    """The identity changes with every byte of the weights and the config."""

    def test_the_same_model_has_the_same_identity(self, llama: Path) -> None:
        assert Checkpoint(llama).identity() == Checkpoint(llama).identity()

    def test_other_weights_of_the_same_size(self, llama: Path, tmp_path: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((llama / name).read_bytes())
        before = Checkpoint(tmp_path).identity()
        data = bytearray((tmp_path / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (tmp_path / "model.safetensors").write_bytes(data)
        assert Checkpoint(tmp_path).identity() != before

    def test_the_identity_has_the_hash_of_every_file(self, llama: Path) -> None:
        data = (llama / "model.safetensors").read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        assert Checkpoint(llama).identity()["files"] == {"model.safetensors": digest}

    def test_another_config(self, llama: Path, tmp_path: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((llama / name).read_bytes())
        before = Checkpoint(tmp_path).identity()
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
        assert Checkpoint(tmp_path).identity() != before
