"""The layout of the package: mirrored tests, small folders, modules and functions, plain docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import roundwise

PACKAGE = Path(roundwise.__file__).parent
TESTS = Path(__file__).parent

MAX_MODULES, MAX_LINES, MAX_BODY = 14, 360, 60
#: Triton programs: their Python is compiled for a device, and the tests of their callers run them.
COMPILED = "triton_kernels.py"
#: Beginnings of docstrings that do not say what a thing does or is.
RIDDLES = ("What ", "How ", "Whether ", "Of ", "Where ", "That ", "Nothing")

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
every_module = pytest.mark.parametrize(
    "module", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES]
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> Iterator[Function]:
    """Yields all functions and methods of a module, also nested ones."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node


def body(function: Function) -> list[ast.stmt]:
    """The statements of a function without its docstring."""
    return function.body[1:] if ast.get_docstring(function) is not None else function.body


def has_logic(tree: ast.Module) -> bool:
    """Returns False for records and protocols.

    They consist of classes whose methods have no body but `...`, or return one derived value.
    """
    methods = {
        id(node)
        for kind in ast.walk(tree)
        if isinstance(kind, ast.ClassDef)
        for node in kind.body
        if isinstance(node, Function)
    }
    for function in functions(tree):
        statements = body(function)
        derived = len(statements) == 1 and isinstance(statements[0], ast.Return)
        empty = all(
            isinstance(node, ast.Pass)
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            for node in statements
        )
        if not (empty or (derived and id(function) in methods)):
            return True
    return False


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (line, text) of the docstrings of the module, its classes, functions and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            if isinstance(text, str):
                yield node.lineno, text


@every_module
def test_each_module_has_a_test_file_of_its_name(module: Path) -> None:
    if module.name == COMPILED or not has_logic(ast.parse(module.read_text(encoding="utf-8"))):
        return
    test = TESTS / module.parent.relative_to(PACKAGE) / f"test_{module.name}"
    assert test.is_file(), f"tests/{test.relative_to(TESTS)} is missing"


@pytest.mark.parametrize(
    "folder",
    sorted({path.parent for path in MODULES}),
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_folders_are_small(folder: Path) -> None:
    modules = [path.name for path in MODULES if path.parent == folder]
    assert len(modules) <= MAX_MODULES, modules


@every_module
def test_modules_are_short(module: Path) -> None:
    lines = len(module.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES


@every_module
def test_functions_are_short(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    lengths = {}
    for function in functions(tree):
        statements = body(function)
        if statements:
            end = statements[-1].end_lineno or 0
            lengths[function.name, function.lineno] = end - statements[0].lineno + 1
    assert {name: length for name, length in lengths.items() if length > MAX_BODY} == {}


@every_module
def test_docstrings_begin_with_what_a_thing_does_or_is(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    riddles = [
        f"{module.relative_to(PACKAGE)}:{line}: {text.splitlines()[0]}"
        for line, text in docstrings(tree)
        if text.startswith(RIDDLES)
    ]
    assert riddles == []
