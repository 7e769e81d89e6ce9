"""The documentation says what the code says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs"


def source() -> str:
    """All code of the package, string literals over several lines joined."""
    files = sorted((ROOT / "src" / "roundwise").rglob("*.py"))
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return re.sub(r'"\s*\n\s*f?"', "", code)


def test_troubleshooting_quotes_messages_that_exist():
    text = (PAGES / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### (.*)$", text, re.MULTILINE)
    messages = [line for line in headings if line[0].islower()]
    code = source()
    assert len(messages) > 10
    assert [line for line in messages if line not in code] == []


def test_the_command_reference_has_every_command_and_option(monkeypatch):
    monkeypatch.syspath_prepend(str(PAGES))
    from commands import reference

    page = reference()
    for command in ("demo", "quantize", "verify", "eval", "serve"):
        assert f"\n## roundwise {command}\n" in page
    sym = "Symmetric grid (fixed zero point) or asymmetric grid (searched zero point)."
    assert f"| `--sym` / `--asym` | {sym} | `--sym` |" in page
    assert re.search(
        r"^\| `--group-size` \| Input channels .* \| the model's \|$", page, re.MULTILINE
    )
    assert re.search(r"^\| `--grid` \| .* \| pivot; textbook: minmax \|$", page, re.MULTILINE)


def code_blocks(text: str) -> str:
    """Fenced and indented blocks of a page; sentences can begin with the same word."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "".join([*fenced, *re.findall(r"^ {4}.*\n", text, re.MULTILINE)])


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in PAGES.glob("*.md"))])
def test_commands_in_the_docs_exist(page):
    """Every long option behind `roundwise COMMAND` in an indented or fenced block."""
    import click
    import typer

    from roundwise.cli.app import app

    group = typer.main.get_command(app)
    code = code_blocks((ROOT / page).read_text(encoding="utf-8")).replace("\\\n", " ")
    for name, rest in re.findall(r"^ *roundwise ([a-z]+) ?([^\n#`]*)", code, re.MULTILINE):
        command = group.get_command(click.Context(group), name)
        assert command is not None, f"{page}: roundwise {name}"
        known = {o for p in command.params for o in [*p.opts, *p.secondary_opts]}
        given = set(re.findall(r"(?<!\S)--[a-z][\w-]*", rest.split(" -- ")[0]))
        assert given <= known | {"--help"}, f"{page}: roundwise {name}"
