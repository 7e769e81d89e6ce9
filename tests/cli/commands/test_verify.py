"""`roundwise verify`: exit code 1 and the reasons if a check fails."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.outputs import only_json
from tests.helpers import Commands, Ended


class TestVerify:
    def test_a_fresh_checkpoint(
        self, commands: Commands, made: tuple[Path, Ended], text_model: Path
    ) -> None:
        found = only_json(commands.run("verify", made[0], "--against", text_model, "--json"))
        assert found["ok"] is True
        assert found["failures"] == []
        assert found["checked"]["layers"] == found["checked"]["weight errors"] == 21
        assert found["checked"]["tensors carried over"] == 9

    def test_a_damaged_one_fails(
        self, commands: Commands, made: tuple[Path, Ended], copied: Path
    ) -> None:
        shard = sorted(copied.glob("*.safetensors"))[0]
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        ended = commands.run("verify", copied, "--json")
        assert ended.code == 1
        assert ended.json["ok"] is False
        assert shard.name in ended.json["failures"][0]
        words = commands.run("verify", copied)
        assert words.code == 1
        assert f"failed: {shard.name} was changed" in words.stderr
        assert "Traceback" not in words.stderr

    @pytest.fixture
    def copied(self, made: tuple[Path, Ended], tmp_path: Path) -> Path:
        return Path(shutil.copytree(made[0], tmp_path / "copy"))

    def test_a_model_that_is_not_quantized_fails(
        self, commands: Commands, text_model: Path
    ) -> None:
        ended = commands.run("verify", text_model, "--json")
        assert ended.code == 1
        assert "is not quantized" in ended.json["failures"][0]
