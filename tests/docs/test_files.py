"""Tests that the documentation names files that exist, and quotes code as it is."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "roundwise"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def file_tree() -> dict[str, bool]:
    """Returns the paths of the file tree in README.md below `src/roundwise`; True for a folder."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.split("    src/roundwise/\n")[1].split("\n    src/native/")[0].splitlines()
    paths: dict[str, bool] = {}
    parents: list[str] = []
    for line in lines:
        entry = line.split()[0]
        depth = (len(line) - len(line.lstrip()) - 6) // 2
        parents = parents[:depth]
        paths["".join([*parents, entry])] = entry.endswith("/")
        if entry.endswith("/"):
            parents.append(entry)
    return paths


def test_the_file_tree_has_every_module_once():
    tree = file_tree()
    listed = [path for path, is_folder in tree.items() if not is_folder]
    folders = [path for path, is_folder in tree.items() if is_folder]
    # A folder without entries of its own stands for all of its files.
    whole = [f for f in folders if not any(path != f and path.startswith(f) for path in tree)]
    modules = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    covered = {path for path in modules if path.startswith(tuple(whole))}
    assert sorted(listed) == sorted(modules - covered)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    files = [link for link in links if "://" not in link]
    assert [link for link in files if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_text_exist(page):
    """Checks every path in backticks that ends in .py and has a folder."""
    paths = re.findall(r"`((?:[\w-]+/)+\w+\.py)`", page.read_text(encoding="utf-8"))
    assert [p for p in paths if not ((PACKAGE / p).exists() or (ROOT / p).exists())] == []


def test_the_published_loop_is_quoted_from_the_tests():
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    (quoted,) = re.findall(r"^```python\n(def .*?)\n```$", text, re.MULTILINE | re.DOTALL)
    source = (ROOT / "tests" / "core" / "oracle.py").read_text(encoding="utf-8")
    functions = {
        node.name: ast.get_source_segment(source, node)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }
    name = quoted.removeprefix("def ").split("(")[0]
    assert functions.get(name) == quoted
