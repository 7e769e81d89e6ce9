"""`roundwise generate`: text, JSON, chat messages and a conversation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from roundwise.cli.commands import generate
from roundwise.inference.prompts import encode_chat
from tests.cli.outputs import only_json
from tests.helpers import CHAT_TEMPLATE, Commands, Ended


class TestGenerate:
    def test_json(self, commands: Commands, tiny: Path) -> None:
        command = ("generate", tiny, "def read_file(path):", "--max-new-tokens", 12, "--json")
        found = only_json(commands.run(*command))
        assert found.keys() == {
            "prompt", "text", "tokens", "prompt_tokens", "finish_reason", "seconds",
            "prompt_tokens_per_second", "generation_tokens_per_second",
        }  # fmt: skip
        assert found["prompt_tokens_per_second"] > 0
        assert found["generation_tokens_per_second"] > 0
        assert found["prompt"] == "def read_file(path):"
        assert 0 < found["tokens"] <= 12
        assert only_json(commands.run(*command))["text"] == found["text"]

    def test_words_are_the_text(self, commands: Commands, made: tuple[Path, Ended]) -> None:
        ended = commands.run(
            "generate", made[0], "import os", "--max-new-tokens", 5, "--temperature", 0.8
        )  # fmt: skip
        assert ended.code == 0
        assert "import os" in ended.stdout
        assert "Traceback" not in ended.stderr

    def test_a_chat(self, commands: Commands, tiny: Path, tmp_path: Path) -> None:
        template = tmp_path / "chat.jinja"
        template.write_text(CHAT_TEMPLATE)
        words = commands.run(
            "generate", tiny, "open a file", "--chat", "--chat-template", template,
            "--max-new-tokens", 5,
        )  # fmt: skip
        assert words.code == 0
        assert "open a file" not in words.stdout  # only the answer
        assert re.match(r"5 tokens in \d+\.\d\d s, \d+\.\d tokens/s after the first$", words.stderr)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["hi", "--chat"], "has no chat template: use plain completions"),
            (["hi", "--system", "be brief"], "are for a chat: add --chat"),
            ([" "], "the prompt is empty"),
            ([], "the prompt is empty"),  # nothing on standard input either
            (["hi", "--max-new-tokens", 0], "--max-new-tokens 0: must be at least 1"),
            (["hi", "--device", "tpu"], "device 'tpu' is not known"),
        ],
    )
    def test_bad_usage(
        self, options: list[object], message: str, commands: Commands, tiny: Path
    ) -> None:
        ended = commands.run("generate", tiny, *options)
        assert ended.code == 2
        assert message in ended.sentence

    def test_a_conversation_on_a_terminal(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        template = tmp_path / "chat.jinja"
        template.write_text(CHAT_TEMPLATE)
        said = iter(["open a file", "and close it"])
        seen: list[Any] = []

        def say(_: str) -> str:
            return next(said, "")

        def encode(tokenizer: Any, messages: list[Any]) -> list[int]:
            seen.append([message["role"] for message in messages])
            return encode_chat(tokenizer, messages)

        monkeypatch.setattr("builtins.input", say)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("roundwise.inference.prompts.encode_chat", encode)
        generate.command(
            str(tiny), chat=True, system="be brief", chat_template=template, max_new_tokens=4
        )
        assert capsys.readouterr().out.count("\n") >= 2
        turn = ["system", "user"]
        assert seen == [turn, turn, [*turn, "assistant", "user"]]
