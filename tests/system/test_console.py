"""Output of the commands: what goes to stdout and to stderr, bars, and the progress of a run."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from roundwise.system import console
from roundwise.system.activity import announce
from roundwise.system.console import count_of, format_seconds, in_words, steps


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(stderr=True, force_terminal=True, width=100, record=True)
    monkeypatch.setattr(console, "console", terminal)
    monkeypatch.delenv("TERM", raising=False)
    with steps("working") as shown:
        shown.update(0.5, "half")
        shown.line("above the bar")
    assert "above the bar" in terminal.export_text()


@pytest.mark.parametrize(
    ("number", "words"), [(1, "1 check"), (2, "2 checks"), (0, "0 checks"), (None, "None checks")]
)
def test_counts(number: int | None, words: str) -> None:
    assert count_of(number, "check") == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, "yes"), (False, "no"), (None, "none"), (4, "4"), ("gptq", "gptq"), ([], "none"),
        ({}, "none"),
        ([4, True], "4, yes"), ({"a": {"b": None}, "c": [1]}, "a: b: none, c: 1"),
    ],
)  # fmt: skip
def test_values_in_words(value: Any, words: str) -> None:
    assert in_words(value) == words


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (75, "1:15"), (3723, "1:02:03")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_work_is_named_once_where_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with steps("working"):
        announce("opening the model")
        for part in range(3):
            announce("measuring", part, 3)
    announce("nobody listens any more")
    assert capsys.readouterr().err.splitlines() == ["opening the model", "measuring"]
    with steps("working", shown=False):
        announce("another rank shows it")
    assert not capsys.readouterr().err


def test_the_clock_runs_through_all_work(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(stderr=True, force_terminal=True, width=100, record=True)
    monkeypatch.setattr(console, "console", terminal)
    monkeypatch.delenv("TERM", raising=False)
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with steps("comparing") as shown:
        shown.stage("perplexity of a", 1.0)  # finished: the clock goes on with what follows
        now[0] = 165.0
        shown.stage("speed of a", 0.0)
        shown.time_left(30.0)
        (task,) = shown._bar.tasks  # type: ignore[union-attr]
        clock = shown._bar.columns[-1]  # type: ignore[union-attr]
        assert task.description == "speed of a"
        assert str(clock.render(task)) == "1:05, about 0:30 left"  # type: ignore[union-attr]
        now[0] = 175.0
        assert str(clock.render(task)) == "1:15, about 0:20 left"  # type: ignore[union-attr]


class TestSafeConsole:
    """Nothing in a checkpoint reaches the terminal as a control character or as markup."""

    def shown(self, *objects: Any) -> str:
        out = io.StringIO()
        console.SafeConsole(file=out, force_terminal=True, width=200, no_color=True).print(*objects)
        return out.getvalue()

    @pytest.mark.parametrize(
        "text",
        ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "a\rb", "\x08", "\x00", "\u202e", "\u2066",
         "\x7f"]
    )  # fmt: skip
    def test_control_characters(self, text: str) -> None:
        assert text not in self.shown(text)
        assert text not in self.shown(Text.assemble(("label", ""), " ", console.visible(text)))
        table = Table("name")
        table.add_row(text)
        assert text not in self.shown(table)
        assert console.visible("é 語\n\t[x] ok") == "é 語\n\t[x] ok"

    @pytest.mark.parametrize("text", ["[/]", "[/red] [bold]", "[red", "]", "a[0]"])
    def test_markup(self, text: str) -> None:
        self.shown(text)  # no MarkupError


class TestEverywhere:
    """Commands whose work takes seconds show a bar on a terminal, and nothing elsewhere."""

    def test_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = Console(stderr=True, force_terminal=True, width=100, record=True)
        monkeypatch.setattr(console, "console", terminal)
        monkeypatch.delenv("TERM", raising=False)
        with steps("verifying", lines=False) as shown:
            announce("checking layers", 3, 12)
            assert shown._bar is not None
            (task,) = shown._bar.tasks
            assert (task.description, task.percentage) == ("checking layers 3/12", 25.0)

    def test_elsewhere(self, capsys: pytest.CaptureFixture[str]) -> None:
        with steps("verifying", lines=False):
            announce("checking layers", 3, 12)
        assert capsys.readouterr().err == ""
