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
    format_seconds,
    print_json,
    print_labelled,
    print_line,
    print_note,
    steps,
)
from roundwise.system.activity import announce


def step(
    block: int,
    layer: Any = None,
    *,
    blocks: int = 4,
    resumed: int = 0,
    left: float | None = None,
) -> Any:
    """Returns a step of a run."""
    return SimpleNamespace(
        block=block, blocks=blocks, resumed=resumed, layer=layer, seconds_left=left
    )


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
    monkeypatch.setattr(progress, "console", terminal)
    monkeypatch.delenv("TERM", raising=False)
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
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


class TestReporter:
    def test_a_line_per_block(self, capsys: pytest.CaptureFixture[str]) -> None:
        report = Reporter(Steps(None, "quantizing"))
        report(step(0, layer("model.layers.0.q_proj", 0.00123)))
        report(step(0, layer("model.layers.0.k_proj", 0.00321)))
        report(step(0, layer("model.layers.0.v_proj", None)))
        report(step(0, left=75.0))
        report(step(1, left=None))
        assert capsys.readouterr().err.splitlines() == [
            "block 1/4  3 layers  error 2.2e-03, max 3.2e-03 k_proj  1:15 left",
            "block 2/4  0 layers",
        ]

    def test_a_line_fits_a_narrow_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        report = Reporter(Steps(None, "quantizing"))
        for expert in range(384):
            report(step(60, layer(f"model.layers.60.experts.{expert}.down_proj", 0.1), blocks=128))
        report(step(60, blocks=128, left=36000.0))
        assert len(capsys.readouterr().err.splitlines()[0]) < 80

    def test_blocks_of_an_earlier_run_do_not_count(self) -> None:
        moves = []

        class Recorded(Steps):
            def update(self, done: float, note: str = "") -> None:
                moves.append((done, note))

        report = Reporter(Recorded(None, "quantizing"))
        report(step(2, layer("model.q", 0.1), resumed=2))
        report(step(2, resumed=2))
        report(step(3, resumed=2))
        assert moves == [(0.0, "block 3/4 q"), (0.5, "block 3/4"), (1.0, "block 4/4")]


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
