"""Splits a text into a part for calibration (or training) and a held-out part for evaluation."""

from pathlib import Path

HELD_OUT = 0.1


def split(text: str) -> tuple[str, str]:
    """Returns the first nine tenths and the last tenth, split at the end of a line."""
    cut = text.index("\n", int(len(text) * (1 - HELD_OUT))) + 1
    return text[:cut], text[cut:]


def split_source(source: str, scratch: Path) -> tuple[str, str]:
    """Returns the sources of both parts: two files in `scratch`, or the named text twice.

    A named text has its own held-out part.
    """
    file = Path(source)
    if not file.is_file():
        return source, source
    names = scratch / file.name, scratch / f"held-out-{file.name}"
    for name, text in zip(names, split(file.read_text(encoding="utf-8")), strict=True):
        name.write_text(text, encoding="utf-8")
    return str(names[0]), str(names[1])
