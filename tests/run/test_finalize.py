"""A complete checkpoint: shards, side files, config.json last and only after the audit, timings."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import roundwise as rw
from roundwise.checkpoint import sharding
from roundwise.checkpoint.manifest import BlockRecord, Fingerprint, GivenNames, read_manifest
from roundwise.checkpoint.reader import CHUNK
from roundwise.checkpoint.untrusted import file_digest
from roundwise.checkpoint.writer import write_safetensors
from roundwise.errors import CheckpointError, RunError
from roundwise.run.finalize import join_blocks, run_record
from roundwise.run.journal import Journal, block_file, read_journal
from tests.conftest import QUICK
from tests.helpers import contents, edited_json, raw, tensors_of, windows
from tests.run.test_journal import record


def test_seconds_add_up_over_blocks() -> None:
    done = [
        BlockRecord(
            block=index, sha256="", nbytes=0, activations=None, layers=[], experts={},
            seconds=seconds, name="", depth_error=None,
        )
        for index, seconds in enumerate([{"solve": 1.0, "read": 2.0}, {"solve": 3.0}])
    ]  # fmt: skip
    record = run_record(done, {"finish": 0.5}, warnings=["w"], issues=["i"])
    assert record.phases == {"solve": 4.0, "read": 2.0, "finish": 0.5}
    assert record.blocks == [3.0, 3.0]
    assert record.seconds == 6.5
    assert (record.warnings, record.not_as_asked) == (["w"], ["i"])
    assert record.peak_rss_bytes > 10**6


def test_config_json_describes_the_format(llama: Path, tmp_path: Path) -> None:
    config = rw.QuantizeConfig(
        bits=8, group_size=32, sym=False, format="gptq_v2", damp_percent=0.05,
        dynamic={"k_proj": None, "v_proj": {"bits": 4}},
    )  # fmt: skip
    rw.quantize(llama, tmp_path / "out", config, windows(), samples=4, seq_len=32, mode="block")
    with edited_json(tmp_path / "out" / "config.json") as settings:
        written = settings["quantization_config"]
    meta = written.pop("meta")
    assert meta["quantizer"] == [f"roundwise:{rw.__version__}"]
    assert written.pop("dynamic").keys() == {"-:.*(?:k_proj)", "+:.*(?:v_proj)"}
    assert written == {
        "quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False, "sym": False,
        "lm_head": False, "checkpoint_format": "gptq_v2", "true_sequential": False,
        "damp_percent": 0.05,
    }  # fmt: skip
    with edited_json(tmp_path / "out" / "quantize_config.json") as older:
        older.pop("meta")
        older.pop("dynamic")
        assert older == written
    with edited_json(llama / "config.json") as original:
        settings.pop("quantization_config")
        assert settings == original


def test_the_files_are_audited_before_config_json_is_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Packing that reverses the rows of every weight: the audit must notice.
    from roundwise.checkpoint import gptq_format

    real = gptq_format.pack
    monkeypatch.setattr(gptq_format, "pack", lambda codes, bits: real(codes.flip(0), bits))
    with pytest.raises(RunError, match=r"failed verification.*weight error"):
        rw.quantize(llama, tmp_path / "out", QUICK, windows(), samples=4, seq_len=32)
    assert not (tmp_path / "out" / "config.json").exists()


class TestShards:
    """Blocks, then the tensors outside them, joined into files of at most `SHARD_BYTES`."""

    def quantize(self, model: Path, out: Path, **options: Any) -> None:
        rw.quantize(model, out, QUICK, windows(), samples=4, seq_len=32, **options)

    def test_the_tensors_are_those_of_a_single_file(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.quantize(llama, tmp_path / "single")
        monkeypatch.setattr(sharding, "SHARD_BYTES", 45_000)
        self.quantize(llama, tmp_path / "shards")
        single, shards = (tensors_of(tmp_path / name) for name in ("single", "shards"))
        assert single.keys() == shards.keys()
        assert all(raw(single[name]) == raw(shards[name]) for name in single)
        files = sorted(path.name for path in (tmp_path / "shards").glob("*safetensors*"))
        index = json.loads((tmp_path / "shards" / files.pop()).read_text())
        assert files == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
        sizes = []
        for file in files:
            tensors = load_file(tmp_path / "shards" / file)
            assert {index["weight_map"][name] for name in tensors} == {file}
            sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert sum(sizes) == index["metadata"]["total_size"]
        assert max(sizes) <= 45_000
        of_block = {name.split(".")[2] for name in load_file(tmp_path / "shards" / files[0])}
        assert of_block == {"0", "1"}  # both blocks, and nothing else, fit into the first
        manifest = read_manifest(tmp_path / "shards")
        assert manifest is not None
        assert [name for name in manifest.files if "safetensors" in name] == [
            *files, "model.safetensors.index.json",
        ]  # fmt: skip
        plain, sharded = (rw.load(tmp_path / name)[0] for name in ("single", "shards"))
        ids = torch.tensor(windows(1))
        with torch.no_grad():
            assert torch.equal(plain(ids).logits, sharded(ids).logits)

    def test_no_block_is_split(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sharding, "SHARD_BYTES", 1)
        self.quantize(llama, tmp_path / "out")
        shards = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
        assert [{name.split(".")[2] for name in shard} for shard in shards[:2]] == [{"0"}, {"1"}]
        outside = [*shards[2:]]
        assert [len(shard) for shard in outside] == [1] * 3
        assert {name for shard in outside for name in shard} == {
            "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
        }  # fmt: skip

    def test_a_block_that_was_changed_before_it_was_joined(
        self, llama: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "out" / ".roundwise" / "block-00000.safetensors"

        def change(step: rw.Progress) -> None:
            if step.layer is None and step.block == 1:
                data = bytearray(file.read_bytes())
                data[-1] ^= 1
                file.write_bytes(data)

        with pytest.raises(RunError, match=r"block-00000.safetensors was changed or removed"):
            self.quantize(llama, tmp_path / "out", progress=change)
        assert read_journal(tmp_path / "out").shards == ()

    def test_a_model_that_was_changed_before_it_was_joined(
        self, copy_of: Callable[[str], Path], tmp_path: Path
    ) -> None:
        model = copy_of("llama")

        def change(step: rw.Progress) -> None:
            if step.layer is None and step.block == 1:
                (model / "model.safetensors").touch()

        with pytest.raises(CheckpointError, match="was changed while it was being read"):
            self.quantize(model, tmp_path / "out", progress=change)
        assert read_journal(tmp_path / "out").shards == ()  # a line would keep the wrong bytes

    def test_joining_takes_little_memory(self, tmp_path: Path) -> None:
        size = 32 << 20
        journal = Journal(tmp_path)
        journal.start(Fingerprint(), GivenNames(model="m", calibration=None))
        done = []
        for index in range(3):
            tensors = {f"{index}.weight": torch.full((size,), index, dtype=torch.uint8)}
            digest = write_safetensors(journal.folder / block_file(index), tensors)
            done.append(record(index).model_copy(update={"sha256": digest, "nbytes": size}))
        streamed: Any = SimpleNamespace(
            other_tensors=dict, checkpoint=SimpleNamespace(check_unchanged=lambda: None)
        )
        tracemalloc.start()
        files = join_blocks(streamed, tmp_path, done, journal)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        journal.close()
        assert peak < 3 * CHUNK < size
        assert files == {"model.safetensors": file_digest(tmp_path / "model.safetensors")}
        joined = load_file(tmp_path / "model.safetensors")
        assert [int(joined[f"{index}.weight"].max()) for index in range(3)] == [0, 1, 2]
        assert not [*journal.folder.glob("block-*")]


class TestOutputFolder:
    """A complete checkpoint and no other files."""

    @pytest.fixture
    def model(self, copy_of: Callable[[str], Path]) -> Path:
        folder = copy_of("llama")
        (folder / "LICENSE").write_text("all yours\n")
        (folder / "tokenizer.model").write_bytes(bytes(range(256)))
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / ".secret").write_text("stays")
        (folder / "pytorch_model.bin").write_bytes(b"other weights")
        return folder

    def test_side_files_are_copied(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        rw.quantize(model, out, QUICK, windows(), samples=4, seq_len=32)
        before, after = contents(model), contents(out)
        for name in ("LICENSE", "tokenizer.model", "chat_template.jinja", "generation_config.json"):
            assert after[name] == before[name]
        assert ".secret" not in after
        assert "pytorch_model.bin" not in after
        assert [n for n in after if "safetensors" in n] == ["model.safetensors"]  # and no index

    def test_the_model_is_not_touched(self, model: Path, tmp_path: Path) -> None:
        before = contents(model)
        rw.quantize(model, tmp_path / "out", QUICK, windows(), samples=4, seq_len=32)
        assert contents(model) == before
