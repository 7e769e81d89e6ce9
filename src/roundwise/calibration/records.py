"""Turns JSON records, as people have them, into texts and chats.

A record is a text (`text`), a chat (`messages` with `role` and `content`, as OpenAI has it, maybe with
`tools`), a chat of ShareGPT (`conversations` with `from` and `value`), or a question and its answer
(Alpaca: `instruction`, `input`, `output`; or `prompt` and `completion`), each maybe with `system`. Other
fields are not looked at.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from roundwise.calibration.media import place_media
from roundwise.errors import CalibrationError, first_line
from roundwise.version import install_command

#: Suffixes of files with one record per line, and of files of records in other forms.
JSON_LINES = (".jsonl", ".ndjson")
RECORDS = (*JSON_LINES, ".json", ".csv", ".parquet")
#: Speakers of ShareGPT -> roles of chat templates.
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "function": "tool", "observation": "tool",
}  # fmt: skip
#: Names of the fields of a question, of what it is about, and of its answer.
QUESTIONS = (("instruction", "input", "output"), ("prompt", "", "completion"),
             ("prompt", "", "response"), ("question", "", "answer"))  # fmt: skip
KNOWN = "`text`, `messages`, `conversations` nor `instruction` and `output`"


@dataclass(frozen=True)
class Chat:
    """A conversation, as chat templates take it."""

    messages: list[dict[str, Any]]
    """Each has a `role`, and `content` or `tool_calls`."""
    tools: list[Any] | None = None
    """Tools that the assistant may call; None: the record names none."""
    plain: str | None = None
    """The same as plain text, for models without a chat template; None: there is no such form."""
    place: str = field(default="", compare=False)
    """File and line that it is from, for error messages; empty: not known."""

    def as_json(self) -> Any:
        """Returns plain JSON values: the messages, with the tools if there are some."""
        return {"messages": self.messages, "tools": self.tools} if self.tools else self.messages


Document = str | Chat


def holds_records(path: Path) -> bool:
    """Tells from the name of a file whether it holds records, not plain text."""
    return path.suffix.lower() in RECORDS


def parse_record(record: Any) -> Document | None:
    """Returns the text or chat of a record; None: it has neither.

    Args:
        record: a JSON value.
    """
    if isinstance(record, str):
        return record
    if not isinstance(record, Mapping):
        return None
    text = record.get("text")
    if isinstance(text, str) and text.strip():
        return text
    chat = parse_chat(record.get("messages", record.get("conversation")))
    if chat is None:
        chat = parse_chat(record.get("conversations"))
    if chat is None:
        chat = _question(record)
    if chat is None:
        return text if isinstance(text, str) else None
    system = record.get("system")
    if isinstance(system, str) and system and chat.messages[:1] and not _has_system(chat):
        chat = replace(chat, messages=[{"role": "system", "content": system}, *chat.messages])
    tools = _parse_tools(record.get("tools") or record.get("functions"))
    return replace(chat, tools=tools) if tools else chat


def _has_system(chat: Chat) -> bool:
    return any(message["role"] in ("system", "developer") for message in chat.messages)


def _parse_tools(value: Any) -> list[Any] | None:
    """Returns a list of tools, which may be written as JSON; None: there are none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) and value else None


def parse_chat(value: Any) -> Chat | None:
    """Returns the chat of a list of messages, in OpenAI's form or ShareGPT's; None: it is no chat."""
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        return None
    messages: list[dict[str, Any]] = []
    for message in value:
        role = ROLES.get(str(message.get("from")))
        if isinstance(message.get("role"), str) and {"content", "tool_calls"} & {*message}:
            # Parquet has all fields in every message. Templates ask which are there.
            messages.append(
                {key: part for key, part in message.items() if key == "content" or part is not None}
            )
        elif role is not None and isinstance(message.get("value"), str):
            messages.append({"role": role, "content": message["value"]})
        else:
            return None
    return Chat(messages)


def _question(record: Mapping[str, Any]) -> Chat | None:
    for asked, about, answered in QUESTIONS:
        question, answer = record.get(asked), record.get(answered)
        if isinstance(question, str) and isinstance(answer, str):
            subject = record.get(about)
            parts = [question, *([subject] if isinstance(subject, str) and subject else [])]
            messages = [
                {"role": "user", "content": "\n\n".join(parts)},
                {"role": "assistant", "content": answer},
            ]
            return Chat(messages, plain="\n\n".join([*parts, answer]))
    return None


def read_records(path: Path, text: str) -> tuple[list[Document], list[str]]:
    """Reads a file of records.

    Args:
        path: the file; its suffix is one of `RECORDS`.
        text: its content; not used for Parquet.

    Returns:
        The documents, and sentences about records that are empty or left out, if there are some.

    Raises:
        CalibrationError: the file is damaged, or no record has a text or a chat.
    """
    documents: list[Document] = []
    wrong: list[str] = []
    empty = 0
    for place, record in _records(path, text):
        document = parse_record(record)
        if document is None:
            wrong.append(place)
        elif isinstance(document, str):
            empty += not document.strip()
            documents.append(document)
        else:
            empty += not document.messages
            documents.append(_with_place(document, record, path, place))
    if wrong and not documents:
        raise CalibrationError(f"{path}, {wrong[0]} has neither {KNOWN}")
    total = len(documents) + len(wrong)
    notes = [f"{path.name}: {empty} of {total} records are empty"] if empty else []
    if wrong:
        notes.append(
            f"{path.name}: {len(wrong)} of {total} records are left out, {wrong[0]} has neither {KNOWN}"
        )
    return documents, notes


def _with_place(chat: Chat, record: Any, path: Path, place: str) -> Chat:
    """Returns a chat with the pictures and sounds of its record, and the place that it is from."""
    try:
        messages = place_media(chat.messages, record, path.parent)
    except CalibrationError as error:
        raise CalibrationError(f"{path}, {place}: {error}") from None
    return replace(chat, messages=messages, place=f"{path.name}, {place}")


def _records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yields each record with its place in the file, in words."""
    suffix = path.suffix.lower()
    if suffix in JSON_LINES or (suffix == ".json" and _has_json_lines(text)):
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"line {number}", _parse_json(line, f"{path}, line {number}")
    elif suffix == ".json":
        value = _parse_json(text, str(path)) if text.strip() else []
        if isinstance(value, dict) and parse_record(value) is None:  # such as {"data": [...]}
            value = next((item for item in value.values() if isinstance(item, list)), value)
        values = value if isinstance(value, list) and parse_chat(value) is None else [value]
        yield from ((f"record {number}", item) for number, item in enumerate(values, start=1))
    elif suffix == ".csv":
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a field may be a book
        rows = csv.DictReader(io.StringIO(text))
        try:
            yield from ((f"line {rows.line_num}", row) for row in rows)
        except csv.Error as error:
            raise CalibrationError(f"{path}, line {rows.line_num} is not CSV: {error}") from None
    else:
        yield from _parquet_records(path)


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{place} is not valid JSON: {error}") from None


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"{path} is a Parquet file: {install_command('datasets')} to read it, or give a .jsonl "
            "file"
        ) from None
    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    except Exception as error:  # errors of pyarrow and datasets, of many types
        raise CalibrationError(f"{path} cannot be read: {first_line(error)}") from error


def is_json(text: str) -> bool:
    """Returns True if a whole text is JSON: one array or object, or one in each line."""
    return text.lstrip()[:1] in ("[", "{") and (_is_value(text) or _has_json_lines(text))


def _has_json_lines(text: str) -> bool:
    """Returns True if there are several lines, and the first and the last of them are JSON objects."""
    lines = text.strip().split("\n")
    ends = (lines[0].strip(), lines[-1].strip())
    return len(lines) > 1 and all(end[:1] == "{" and _is_value(end) for end in ends)


def _is_value(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
