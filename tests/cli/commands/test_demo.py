"""`roundwise demo`, on a part of the bundled model."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import transformers

from roundwise.calibration import sources
from roundwise.cli import main
from roundwise.verify import audit


class TestDemo:
    """In this process, with one block and few tokens: the whole of it takes a minute."""

    @pytest.fixture
    def first_block(self, tiny: Path, tmp_path: Path) -> Path:
        """The bundled model without all blocks but the first."""
        folder = Path(shutil.copytree(tiny, tmp_path / "first-block"))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, num_hidden_layers=1, dtype="auto"
        )
        model.save_pretrained(folder)
        return folder

    @pytest.fixture
    def demo(
        self,
        first_block: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> Iterator[Callable[..., str]]:
        monkeypatch.setattr("roundwise.system.hub.bundled_model", lambda: first_block)
        monkeypatch.setattr("roundwise.cli.commands.demo.TOKENS", 400)
        some = {kept: list(islice(sources._stdlib(held_out=kept), 4)) for kept in (True, False)}
        monkeypatch.setattr(sources, "_stdlib", lambda *, held_out: some[held_out])
        handler = signal.getsignal(signal.SIGTERM)

        def run(*arguments: object) -> str:
            monkeypatch.setattr(sys, "argv", ["roundwise", "demo", *map(str, arguments)])
            with pytest.raises(SystemExit) as end:
                main()
            assert end.value.code == 0
            return capsys.readouterr().out

        yield run
        signal.signal(signal.SIGTERM, handler)

    @pytest.mark.slow
    def test_json_then_words(self, demo: Callable[..., str], tmp_path: Path) -> None:
        found = json.loads(demo(tmp_path / "demo", "--samples", 2, "--json"))
        rows = {row["name"]: row for row in found["results"]}
        assert list(rows) == ["original", "RTN 4 bit", "GPTQ 4 bit", "RTN 3 bit", "GPTQ 3 bit"]
        assert all(row["perplexity"] > 1 for row in rows.values())
        assert rows["GPTQ 4 bit"]["bytes"] < rows["original"]["bytes"]
        assert rows["GPTQ 3 bit"]["bits_per_weight"] < rows["GPTQ 4 bit"]["bits_per_weight"]
        checkpoint = Path(found["checkpoint"])
        assert (checkpoint / "config.json").exists()
        assert not audit(checkpoint).failures
        # Again, in the same folder: a table and how to go on.
        words = demo(tmp_path / "demo", "--samples", 1)
        assert "perplexity" in words
        assert "GPTQ 3 bit" in words
        assert f"checkpoint: {checkpoint}" in words
        assert f"roundwise generate {checkpoint}" in words
