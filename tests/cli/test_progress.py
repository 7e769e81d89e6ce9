"""Output of the commands: what goes to stdout and to stderr, bars, and the progress of a run."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from roundwise.cli import progress
from roundwise.cli.progress import (
    Reporter,
    Steps,
    count_of,
    print_json,
    print_labelled,
    print_line,
    print_note,
    steps,
)


def step(block: int, layer: Any = None, *, blocks: int = 4, resumed: int = 0) -> Any:
    """Returns a step of a run."""
    return SimpleNamespace(block=block, blocks=blocks, resumed=resumed, layer=layer)


def layer(name: str, error: float | None) -> Any:
    """Returns as much of a layer's record as is shown."""
    return SimpleNamespace(name=name, relative_error=error)


def test_results_go_to_stdout_and_the_rest_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1, None]})
    print_line("a result " + "that is not wrapped " * 10)
    print_labelled({"one": "1", "three": "3"}, width=6)
    print_note("a note")
    with steps("working") as shown:
        shown.update(0.5, "half")
        shown.line("a step")
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == '{"a": [1, null]}'
    assert len(out.splitlines()) == 4
    assert out.endswith("one    1\nthree  3\n")
    assert err == "a note\na step\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(stderr=True, force_terminal=True, width=100, record=True)
    monkeypatch.setattr(progress, "console", terminal)
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


class TestReporter:
    def test_a_line_per_block(self, capsys: pytest.CaptureFixture[str]) -> None:
        report = Reporter(Steps(None, "quantizing"))
        report(step(0, layer("model.layers.0.q_proj", 0.00123)))
        report(step(0, layer("model.layers.0.k_proj", None)))
        report(step(0))
        report(step(1))
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("block 1/4  q_proj 1.23e-03  k_proj  ")
        assert lines[1].startswith("block 2/4    ")
        assert all(line.endswith(" s left") for line in lines)

    def test_blocks_of_an_earlier_run_do_not_count(self) -> None:
        moves = []

        class Recorded(Steps):
            def update(self, done: float, note: str = "") -> None:
                moves.append((done, note))

        report = Reporter(Recorded(None, "quantizing"))
        report(step(2, layer("q", 0.1), resumed=2))
        report(step(2, resumed=2))
        report(step(3, resumed=2))
        assert moves == [(0.0, "q"), (0.5, ""), (1.0, "")]


class TestSafeConsole:
    """Nothing in a checkpoint reaches the terminal as a control character or as markup."""

    def shown(self, *objects: Any) -> str:
        out = io.StringIO()
        progress.SafeConsole(file=out, force_terminal=True, width=200, no_color=True).print(
            *objects
        )
        return out.getvalue()

    @pytest.mark.parametrize(
        "text",
        ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "a\rb", "\x08", "\x00", "\u202e", "\u2066",
         "\x7f"]
    )  # fmt: skip
    def test_control_characters(self, text: str) -> None:
        assert text not in self.shown(text)
        assert text not in self.shown(progress._labelled(text, "label", ""))
        table = Table("name")
        table.add_row(text)
        assert text not in self.shown(table)
        assert progress.visible("é 語\n\t[x] ok") == "é 語\n\t[x] ok"

    @pytest.mark.parametrize("text", ["[/]", "[/red] [bold]", "[red", "]", "a[0]"])
    def test_markup(self, text: str) -> None:
        assert text in self.shown(progress._labelled(text, "", ""))
        self.shown(text)  # no MarkupError
