"""`roundwise eval`: perplexity as `rw.perplexity` computes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import roundwise as rw
from tests.cli.outputs import only_json
from tests.helpers import Commands, Ended


class TestEval:
    def test_json_is_what_python_computes(
        self, commands: Commands, made: tuple[Path, Ended], text: Path
    ) -> None:
        ended = commands.run(
            "eval", made[0], "--text", text, "--window", 64, "--stride", 32, "--max-tokens", 300,
            "--json",
        )  # fmt: skip
        found = only_json(ended)
        model, tokenizer = rw.load(made[0])
        expected = rw.perplexity(
            model, tokenizer, text.read_text(), window=64, stride=32, max_tokens=300
        )
        assert found == {
            "perplexity": pytest.approx(expected.perplexity, rel=1e-6),
            "tokens": 299, "window": 64, "stride": 32,
        }  # fmt: skip

    def test_words(self, commands: Commands, text_model: Path, text: Path) -> None:
        ended = commands.run("eval", text_model, "--text", text, "--max-tokens", 100)
        assert ended.code == 0
        assert re.match(
            r"perplexity \d+\.\d{4}  \(99 tokens, window 100, stride 100\)$", ended.stdout
        )  # fmt: skip
