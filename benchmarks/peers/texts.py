"""A text as two: what is calibrated (or trained) with, and what is held out for the judge."""

from pathlib import Path

HELD_OUT = 0.1


def split(text: str) -> tuple[str, str]:
    """The first nine tenths and the last tenth, cut at the end of a line."""
    cut = text.index("\n", int(len(text) * (1 - HELD_OUT))) + 1
    return text[:cut], text[cut:]


def parts(source: str, scratch: Path) -> tuple[str, str]:
    """A source as two: files in `scratch`; a named text has a held-out part of its own."""
    file = Path(source)
    if not file.is_file():
        return source, source
    names = scratch / file.name, scratch / f"held-out-{file.name}"
    for name, text in zip(names, split(file.read_text(encoding="utf-8")), strict=True):
        name.write_text(text, encoding="utf-8")
    return str(names[0]), str(names[1])
