"""English prose for real models: the docstrings that Python and pinned packages carry.

Files are read as text and parsed; nothing is imported or run. Every tenth file is held out, so that no
docstring is in both parts.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

#: Packages beside the standard library; `constraints.txt` pins their versions.
PACKAGES = ("numpy", "torch", "transformers")
#: Fewest characters of a docstring: shorter ones are mostly one line of no sentence.
SHORTEST = 200
#: Files whose hash ends in this digit are held out.
HELD_OUT_DIGIT = 7


def write_prose(folder: Path) -> tuple[Path, Path]:
    """Writes `calibration.txt` and `held-out.txt` to a folder and returns their paths."""
    parts: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for name, file in _files():
        held_out = is_held_out(name)
        for docstring in filter(_is_prose, docstrings(file)):
            if docstring not in seen:  # generated code repeats some
                seen.add(docstring)
                parts[held_out].append(docstring)
    paths = folder / "calibration.txt", folder / "held-out.txt"
    for path, part in zip(paths, parts, strict=True):
        path.write_text("\n\n".join(part) + "\n", encoding="utf-8")
    return paths


def is_held_out(name: str) -> bool:
    """Returns True for a tenth of all names, the same everywhere."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == HELD_OUT_DIGIT


def _files() -> Iterator[tuple[str, Path]]:
    """Yields the name and path of every source file, in the order of their names."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"]), *(Path(paths["purelib"]) / package for package in PACKAGES)]
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            inside = file.relative_to(root)
            if not {"site-packages", "test", "tests"} & set(inside.parts[:-1]):
                yield f"{root.name}/{inside}", file


def docstrings(file: Path) -> Iterator[str]:
    """Yields the docstrings of a source file, of its module first; none if it is not valid Python."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _is_prose(text: str) -> bool:
    """Returns True for long text of letters and spaces mostly, not tables, signatures or code."""
    letters = sum(c.isalpha() or c in " ,." for c in text)
    return len(text) >= SHORTEST and letters >= 0.9 * len(text)
