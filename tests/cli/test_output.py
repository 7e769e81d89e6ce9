"""What goes to stdout and to stderr."""

from __future__ import annotations

import pytest

from roundwise.cli.output import print_json, print_labelled, print_line, print_note
from roundwise.system.console import steps


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


@pytest.mark.parametrize("text", ["\x1b[2J", "a\rb", "\u202e"])
def test_control_characters_are_escaped(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_line(text, label="label")
    print_note(text)
    for printed in capsys.readouterr():
        assert printed and text not in printed


@pytest.mark.parametrize("text", ["[/]", "[/red] [bold]", "[red", "]", "a[0]"])
def test_texts_have_no_markup(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_line(text)
    assert capsys.readouterr().out == text + "\n"
