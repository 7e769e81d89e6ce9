"""A complete checkpoint: side files, config.json last and only after the audit, timings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import roundwise as rw
from roundwise.checkpoint.manifest import BlockRecord
from roundwise.errors import RunError
from roundwise.run.finalize import run_record, shard_name
from tests.conftest import QUICK
from tests.helpers import contents, edited_json, windows


def test_names_of_shards() -> None:
    assert shard_name(0, 2) == "model-00001-of-00003.safetensors"
    assert shard_name(2, 2) == "model-00003-of-00003.safetensors"  # tensors outside the blocks


def test_seconds_add_up_over_blocks() -> None:
    done = [
        BlockRecord(
            block=index, shard="x", sha256="", activations=None, layers=[], experts={},
            seconds=seconds, name="", depth_error=None, saturation=None,
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
        assert {n for n in after if n.endswith(".safetensors")} == {
            f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
        }

    def test_the_model_is_not_touched(self, model: Path, tmp_path: Path) -> None:
        before = contents(model)
        rw.quantize(model, tmp_path / "out", QUICK, windows(), samples=4, seq_len=32)
        assert contents(model) == before
