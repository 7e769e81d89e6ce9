"""The audit finds every change to a finished checkpoint, and passes an unchanged one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import roundwise as rw
from roundwise.checkpoint.reader import Checkpoint
from roundwise.checkpoint.side_files import OWN_FILES
from roundwise.errors import VerificationError
from roundwise.publish.card import CARD
from roundwise.verify import Audit, audit
from tests.helpers import ARCHITECTURES, Commands, contents, edited_json

FLIPS = 200


@pytest.fixture
def out(quantized: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a finished checkpoint that a test may damage."""
    return Path(shutil.copytree(quantized("llama"), tmp_path / "out"))


@pytest.fixture
def anonymous(out: Path) -> Path:
    """The same without roundwise.json, as another tool would write it."""
    (out / "roundwise.json").unlink()
    return out


def changed(file: Path, tensor: str, change: Callable[[torch.Tensor], None]) -> None:
    """Changes one tensor of a safetensors file and nothing else."""
    tensors = load_file(file)
    change(tensors[tensor])
    save_file(tensors, file, metadata={"format": "pt"})


def swap(tensor: torch.Tensor) -> None:
    first, second = tensor[0, 0].clone(), tensor[0, 1].clone()
    assert first != second
    tensor[0, 0], tensor[0, 1] = second, first


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fresh_checkpoint_passes(
    name: str, folder_of: Callable[[str], Path], quantized: Callable[..., Path]
) -> None:
    source = Checkpoint(folder_of(name))
    report = audit(quantized(name), against=source)
    assert report.failures == []
    layers = report.checked["layers"]
    assert report.checked["weight errors"] == layers > 0
    assert report.checked["tensors carried over"] == len(source.tensors) - layers
    # All but the manifest itself, and the card, which may be written again.
    assert report.checked["files"] == len(contents(quantized(name))) - 2


def test_every_flipped_bit_is_found(out: Path) -> None:
    generator = random.Random(30)
    shards = sorted(out.glob("*.safetensors"))
    for _ in range(FLIPS):
        shard = generator.choice(shards)
        before = shard.read_bytes()
        data = bytearray(before)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        shard.write_bytes(data)
        assert any(shard.name in failure for failure in audit(out).failures)
        shard.write_bytes(before)
    assert audit(out).failures == []


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_a_manifest_that_names_files_outside_the_folder_is_refused(name: str, out: Path) -> None:
    with edited_json(out / "roundwise.json") as manifest:
        manifest["files"][name] = "0" * 64
    assert any(f"{name!r} is not in the folder" in failure for failure in audit(out).failures)


def test_every_deleted_file_is_found(out: Path) -> None:
    for name in contents(out):
        if name in ("roundwise.json", CARD):
            continue
        data = (out / name).read_bytes()
        (out / name).unlink()
        assert f"{name} is missing" in audit(out).failures
        (out / name).write_bytes(data)


def test_every_changed_file_is_found(out: Path) -> None:
    for path in out.iterdir():
        if path.name in (*OWN_FILES, CARD):
            continue
        data = path.read_bytes()
        path.write_bytes(data + b" ")
        report = audit(out)
        # Weights and configs are evidence; what lies beside them is a note.
        told = report.notes if path.name == "generation_config.json" else report.failures
        assert f"{path.name} was changed" in told
        path.write_bytes(data)


def test_a_tokenizer_that_is_saved_again_is_a_note(
    tiny: Path, tmp_path: Path, commands: Commands
) -> None:
    """Every tutorial of AutoGPTQ saves it to the result after the run."""
    out = tmp_path / "out"
    config = rw.QuantizeConfig(method="rtn", group_size=32)
    rw.quantize(tiny, out, config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(out)
    report = audit(out, against=Checkpoint(tiny))
    assert report.failures == []
    assert "tokenizer_config.json was changed" in report.notes
    ended = commands.run("verify", out)
    assert (ended.code, ended.stdout.splitlines()[-1]) == (0, "verified")
    assert "note: tokenizer_config.json was changed" in ended.stderr
    # The run is finished all the same: the command that made it has nothing to do.
    assert rw.quantize(tiny, out, config).output == out
    with edited_json(out / "config.json") as changed:
        changed["rope_theta"] = 1.0
    assert audit(out).failures == ["config.json was changed"]


def test_a_side_file_that_is_gone_is_a_failure(tiny: Path, tmp_path: Path) -> None:
    rw.quantize(tiny, tmp_path / "out", rw.QuantizeConfig(method="rtn", group_size=32))
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert audit(tmp_path / "out").failures == ["tokenizer.json is missing"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3, "layers": []}'])
def test_a_damaged_manifest_is_found(text: str, out: Path) -> None:
    (out / "roundwise.json").write_text(text)
    assert audit(out).failures


def test_swapped_scales_are_found_by_their_hash(out: Path) -> None:
    changed(out / "model.safetensors", "model.layers.0.mlp.up_proj.scales", swap)
    assert audit(out).failures


def test_swapped_scales_are_found_by_the_weight_error_too(out: Path, llama: Path) -> None:
    # Even if the manifest has the hash of the changed file.
    shard = out / "model.safetensors"
    changed(shard, "model.layers.0.mlp.up_proj.scales", swap)
    with edited_json(out / "roundwise.json") as manifest:
        from roundwise.checkpoint.reader import file_digest

        manifest["files"][shard.name] = file_digest(shard)
    assert audit(out).failures == []
    failures = audit(out, against=Checkpoint(llama)).failures
    assert len(failures) == 1
    assert "model.layers.0.mlp.up_proj has weight error" in failures[0]


class TestWithoutManifest:
    """A checkpoint without a manifest is compared with its original."""

    NAME = "model.layers.0.mlp.up_proj"

    def failures(self, folder: Path, source: Path) -> list[str]:
        return audit(folder, against=Checkpoint(source)).failures

    def test_passes(self, anonymous: Path, llama: Path) -> None:
        report = audit(anonymous, against=Checkpoint(llama))
        assert report.failures == []
        assert "files" not in report.checked
        assert report.checked["weight errors"] == 14

    def test_another_zero_point_convention(self, anonymous: Path, llama: Path) -> None:
        with edited_json(anonymous / "config.json") as config:
            config["quantization_config"]["checkpoint_format"] = "gptq_v2"
        assert self.failures(anonymous, llama)

    def test_codes_of_another_layer(self, anonymous: Path, llama: Path) -> None:
        shard = anonymous / "model.safetensors"
        other = load_file(shard)["model.layers.0.mlp.gate_proj.qweight"]
        changed(shard, f"{self.NAME}.qweight", lambda tensor: tensor.copy_(other))
        assert self.NAME in self.failures(anonymous, llama)[0]

    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
    def test_a_scale_that_cannot_be(self, value: float, anonymous: Path, llama: Path) -> None:
        shard = anonymous / "model.safetensors"
        changed(shard, f"{self.NAME}.scales", lambda tensor: tensor[1, 2].fill_(value))
        failures = self.failures(anonymous, llama)
        assert f"{self.NAME} has a scale that is zero or not finite" in failures

    def test_g_idx_in_another_order(self, anonymous: Path, llama: Path) -> None:
        shard = anonymous / "model.safetensors"
        changed(shard, f"{self.NAME}.g_idx", lambda tensor: tensor.copy_(tensor.flip(0)))
        assert any("desc_act is off" in failure for failure in self.failures(anonymous, llama))

    def test_g_idx_that_fills_a_group_twice(self, anonymous: Path, llama: Path) -> None:
        shard = anonymous / "model.safetensors"
        changed(shard, f"{self.NAME}.g_idx", lambda tensor: tensor.zero_())
        assert any("64 channels into a group of 32" in f for f in self.failures(anonymous, llama))

    def test_a_norm_that_differs(self, anonymous: Path, llama: Path) -> None:
        shard = anonymous / "model.safetensors"
        changed(shard, "model.norm.weight", lambda tensor: tensor[7].add_(1e-6))
        assert self.failures(anonymous, llama) == [
            "tensor model.norm.weight differs from the original"
        ]

    def test_a_bias_that_is_gone(self, anonymous: Path, llama: Path) -> None:
        shard = anonymous / "model.safetensors"
        tensors = load_file(shard)
        del tensors["model.layers.0.self_attn.q_proj.bias"]
        save_file(tensors, shard, metadata={"format": "pt"})
        assert self.failures(anonymous, llama) == [
            "tensor model.layers.0.self_attn.q_proj.bias is missing"
        ]

    def test_a_side_file_that_is_gone(self, anonymous: Path, llama: Path) -> None:
        (anonymous / "generation_config.json").unlink()
        assert self.failures(anonymous, llama) == ["generation_config.json is missing"]

    def test_another_model(self, anonymous: Path, folder_of: Callable[[str], Path]) -> None:
        assert self.failures(anonymous, folder_of("mistral"))

    def test_a_scale_that_is_missing(self, anonymous: Path, llama: Path) -> None:
        shard = anonymous / "model.safetensors"
        tensors = load_file(shard)
        del tensors[f"{self.NAME}.scales"]
        save_file(tensors, shard, metadata={"format": "pt"})
        assert self.failures(anonymous, llama) == [f"{self.NAME} lacks scales"]


def test_a_model_that_is_not_quantized(llama: Path) -> None:
    (failure,) = audit(llama).failures
    assert "is not quantized" in failure


def test_failures_are_raised_by_name(tmp_path: Path) -> None:
    report = Audit(tmp_path)
    for number in range(5):
        report.check("files", f"file {number} is missing")
    with pytest.raises(VerificationError, match=r"file 0.*file 2 is missing \(and 2 more\)"):
        report.raise_on_failure()
    assert json.dumps(report.checked) == '{"files": 5}'
