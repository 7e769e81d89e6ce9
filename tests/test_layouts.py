"""Checkpoints in one file, in shards, and with a file per block, as earlier versions made them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import roundwise as rw
from roundwise.checkpoint import sharding
from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.untrusted import file_digest
from roundwise.cli.commands.inspect import summarize
from roundwise.convert import convert
from roundwise.errors import OutputError
from roundwise.run.reproduce import reproduce
from roundwise.verify import audit
from tests.helpers import contents, edited_json, raw, tensors_of, windows

CONFIG = rw.QuantizeConfig(method="rtn", group_size=32)


def quantize(model: Path, out: Path) -> rw.QuantizeResult:
    return rw.quantize(model, out, CONFIG)


def split_by_block(folder: Path, blocks: int) -> None:
    """Divides a checkpoint in one file into one per block and one for the rest; its manifest too."""
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(blocks + 1)]
    for name, tensor in tensors_of(folder).items():
        number = int(name.split(".")[2]) if ".layers." in name else blocks
        parts[number][name] = tensor
    (folder / "model.safetensors").unlink()
    names = [f"model-{i:05d}-of-{blocks + 1:05d}.safetensors" for i in range(1, blocks + 2)]
    weight_map = {}
    for file, tensors in zip(names, parts, strict=True):
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    names.append("model.safetensors.index.json")
    (folder / names[-1]).write_text(json.dumps(index))
    with edited_json(folder / "roundwise.json") as manifest:
        others = {k: v for k, v in manifest["files"].items() if k != "model.safetensors"}
        manifest["files"] = {name: file_digest(folder / name) for name in names} | others


@pytest.fixture(scope="module")
def single(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "out"
    quantize(llama, out)
    return out


@pytest.fixture(scope="module", params=["single", "shards", "file per block"])
def made(
    request: pytest.FixtureRequest,
    single: Path,
    llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A checkpoint in each layout. Do not change it."""
    out = tmp_path_factory.mktemp("layout") / "out"
    if request.param == "shards":
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sharding, "SHARD_BYTES", 45_000)
            quantize(llama, out)
    else:
        shutil.copytree(single, out)
        if request.param == "file per block":
            split_by_block(out, blocks=2)
    count = {"single": 1, "shards": 3, "file per block": 3}[request.param]
    assert len([*out.glob("*.safetensors")]) == count
    assert (out / "model.safetensors.index.json").exists() == (count > 1)
    return out


def test_verify(made: Path, llama: Path) -> None:
    report = audit(made, against=Checkpoint(llama))
    assert report.failures == []
    assert report.checked["weight errors"] == 14
    assert report.checked["files"] == len(contents(made)) - 2  # no manifest, no card


def test_verify_finds_a_change_in_any_file(made: Path, tmp_path: Path) -> None:
    for file in sorted(made.glob("*.safetensors")):
        copied = Path(shutil.copytree(made, tmp_path / file.name))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        (copied / file.name).write_bytes(data)
        assert f"{file.name} was changed" in audit(copied).failures


def test_load(made: Path, single: Path) -> None:
    ids = torch.tensor(windows(2))
    logits = []
    for folder in (made, single):
        with torch.no_grad():
            logits.append(rw.load(folder)[0](ids).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("target", ["gptq_v2", "compressed-tensors", "dense"])
def test_convert(target: str, made: Path, single: Path, tmp_path: Path) -> None:
    ours, theirs = (
        tensors_of(convert(folder, tmp_path / name, target))  # type: ignore[arg-type]
        for folder, name in ((made, "a"), (single, "b"))
    )
    assert ours.keys() == theirs.keys()
    assert all(raw(ours[name]) == raw(theirs[name]) for name in ours)


def test_inspect(made: Path, single: Path) -> None:
    ours, theirs = (summarize(str(folder)).as_dict() for folder in (made, single))
    assert ours.pop("checkpoint") != theirs.pop("checkpoint")
    assert (ours.pop("files"), theirs.pop("files")) == (len([*made.glob("*.safetensors")]), 1)
    layers = [
        sorted(each.pop("layers"), key=lambda layer: layer["name"]) for each in (ours, theirs)
    ]
    assert layers[0] == layers[1]
    assert ours == theirs


def test_the_same_run_finds_it_finished(made: Path, llama: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made, tmp_path / "out"))
    before = contents(out)
    assert len(quantize(llama, out).layers) == 14
    assert contents(out) == before
    with pytest.raises(OutputError, match="finished checkpoint made with other settings"):
        rw.quantize(llama, out, CONFIG.merged({"bits": 8}))
    rw.quantize(llama, out, CONFIG.merged({"bits": 8}), restart=True)  # no file of it remains
    assert [path.name for path in out.glob("*safetensors*")] == ["model.safetensors"]
    assert audit(out, against=Checkpoint(llama)).failures == []


def test_a_run_that_is_repeated(made: Path, single: Path, tmp_path: Path) -> None:
    repeated = reproduce(made, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(single)
    assert all(repeated.files[name] for name in ("config.json", "quantize_config.json"))
    files = len([*made.glob("*.safetensors")])
    assert repeated.same == (files == 1)
    expected = f"a checkpoint of {files} weight files, and {tmp_path / 'out'} has 1"
    assert any(expected in line for line in repeated.result.not_as_asked) == (files > 1)
