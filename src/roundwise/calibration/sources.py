"""Reads calibration and evaluation texts: files, named data sets, Python's own standard library.

A source becomes a list of documents, each a text or a chat (list of messages).
"""

from __future__ import annotations

import glob
import math
import sysconfig
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from roundwise.calibration.records import (
    RECORDS,
    Document,
    holds_records,
    is_json,
    parse_chat,
    read_records,
)
from roundwise.errors import CalibrationError, first_line
from roundwise.version import install_command


class NamedSet(NamedTuple):
    """A public data set with a short name; calibration takes its split `train`."""

    name: str
    subset: str | None
    column: str
    held_out: str
    """Split for evaluation."""
    evaluation_name: str | None = None
    """Data set for evaluation; None: the same."""


NAMED_SETS = {
    "wikitext2": NamedSet("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "test"),
    "c4": NamedSet("allenai/c4", "en", "text", "validation"),
    "ptb": NamedSet("ptb-text-only/ptb_text_only", None, "sentence", "test"),
    # Code from GitHub, deduplicated; needs no account.
    "github-code": NamedSet(
        "codeparrot/codeparrot-clean-train", None, "content", "train",
        "codeparrot/codeparrot-clean-valid",
    ),
}  # fmt: skip
#: Suffixes of the files that are read from a folder.
TEXTS = (".txt", ".md", ".rst", *RECORDS)
#: Maximum documents read from a public data set, which may be far larger than any calibration needs.
MAX_DOCUMENTS = 20_000


class SourceText(NamedTuple):
    """Documents of a source."""

    documents: list[Document]
    left_out: list[str]
    """Sentences about what is not used, or not as it was meant."""


def read_documents(source: str, *, held_out: bool = False) -> SourceText:
    """Returns the documents of a source, in a fixed order.

    Args:
        source: a text file; a file of records (JSON lines, a JSON array, CSV, Parquet; see
            `calibration.records`); a folder or a pattern (`notes/*.md`) of such files;
            `python-stdlib`; one of `NAMED_SETS`; or NAME:SPLIT:COLUMN of a Hugging Face data set.
        held_out: read the part meant for evaluation, if the source has one.

    Raises:
        CalibrationError: there is no such source, a file is unreadable, or it holds no text.
    """
    documents: list[Document] = []
    left_out: list[str] = []
    files = _files(source)
    if files:
        for file in files:
            found, notes = _read_file(file)
            documents += found
            left_out += notes
    elif source == "python-stdlib":
        documents = list(_stdlib(held_out=held_out))
    elif source in NAMED_SETS or source.count(":") == 2:
        documents = _read_named(source, held_out=held_out)
    else:
        raise CalibrationError(
            f"there is no file {source!r} and no data set of that name: give a .txt or .jsonl file, a "
            f"folder, python-stdlib, {', '.join(NAMED_SETS)}, or NAME:SPLIT:COLUMN of a Hugging Face "
            "data set"
        )
    documents = [document for document in documents if _has_content(document)]
    if not documents:
        raise CalibrationError(f"{source} holds no text")
    return SourceText(documents, left_out)


def parse_mixture(source: str) -> list[tuple[str, float]]:
    """Returns sources and their weights, which add up to 1; weights that are not given are equal.

    Args:
        source: one source, or several such as `code.txt:0.7,chat.jsonl:0.3`.

    Raises:
        CalibrationError: a weight that is not above zero, or some with a weight and some without.
    """
    if Path(source).exists():
        return [(source, 1.0)]
    parts: list[tuple[str, float | None]] = []
    for part in source.split(","):
        name, colon, weight = part.strip().rpartition(":")
        try:
            parts.append((name, float(weight)) if colon else (part.strip(), None))
        except ValueError:  # NAME:SPLIT:COLUMN
            parts.append((part.strip(), None))
    weights = [weight for _, weight in parts if weight is not None]
    if not weights:
        return [(name, 1 / len(parts)) for name, _ in parts]
    if len(weights) < len(parts) or not all(0 < weight < math.inf for weight in weights):
        raise CalibrationError(
            f"calibration {source!r}: give every source a weight above 0, such as "
            "code.txt:0.7,chat.jsonl:0.3, or give no weights"
        )
    return [(name, weight / sum(weights)) for (name, _), weight in zip(parts, weights, strict=True)]


def _files(source: str) -> list[Path]:
    """Returns the files of a source in order: the file itself, those of a folder, or of a pattern."""
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in TEXTS and file.is_file()
        )
        if not files:
            raise CalibrationError(f"{source} holds no files that end in {', '.join(TEXTS)}")
        return files
    matches = glob.glob(source, recursive=True)  # noqa: PTH207  # Path.glob refuses absolute patterns
    return sorted(Path(match) for match in matches if Path(match).is_file())


def _has_content(document: Document) -> bool:
    """Returns True if a document has more than white space."""
    return bool(document.strip() if isinstance(document, str) else document.messages)


def _read_file(path: Path) -> tuple[list[Document], list[str]]:
    """Returns the documents of a file, and sentences about what is left out."""
    if path.suffix.lower() == ".parquet":
        return read_records(path, "")
    text = _read_text(path)
    if holds_records(path):
        return read_records(path, text)
    if is_json(text):
        return [text], [
            f"{path.name} is JSON and is read as plain text, with its braces and field names: call it "
            ".json or .jsonl if it holds records"
        ]
    return [text], []


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # without the byte order mark, if there is one
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None


def _stdlib(*, held_out: bool) -> Iterator[str]:
    """Yields the source files of Python's standard library; every 20th file is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    excluded = {"site-packages", "test", "tests", "encodings", "__pycache__"}
    files = [
        file
        for file in sorted(root.rglob("*.py"))
        if not excluded & set(file.relative_to(root).parts[:-1])
    ]
    for index, file in enumerate(files):
        if (index % 20 == 7) == held_out:
            yield file.read_text(encoding="utf-8", errors="replace")


def _read_named(source: str, *, held_out: bool) -> list[Document]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"{source} is a Hugging Face data set: {install_command('datasets')} to read it, "
            "or give a text file"
        ) from None
    load: Callable[..., Any] = load_dataset
    if source in NAMED_SETS:
        known = NAMED_SETS[source]
        subset, column = known.subset, known.column
        name = (known.evaluation_name or known.name) if held_out else known.name
        split = known.held_out if held_out else "train"
    else:
        name, split, column = source.split(":")
        subset = None
    try:
        rows = load(name, subset, split=split, streaming=True)
        values = [row[column] for row in islice(rows, MAX_DOCUMENTS)]
    except KeyError:
        raise CalibrationError(f"{name} has no column {column!r}") from None
    except Exception as error:  # network, unknown set, missing split: errors of many types
        raise CalibrationError(
            f"data set {name} ({split}) cannot be read: {first_line(error)}"
        ) from error
    documents = [value if isinstance(value, str) else parse_chat(value) for value in values]
    if not all(document is not None for document in documents):
        raise CalibrationError(f"column {column!r} of {name} holds neither text nor chats")
    return [document for document in documents if document is not None]


def read_text(source: str) -> str:
    """Returns the part of a source meant for evaluation as one text, documents joined by newlines.

    Raises:
        CalibrationError: as for `read_documents`, or the source holds chats.
    """
    documents = read_documents(source, held_out=True).documents
    if not all(isinstance(document, str) for document in documents):
        raise CalibrationError(f"{source} holds chats; perplexity is measured on plain text")
    return "\n".join(document for document in documents if isinstance(document, str))
