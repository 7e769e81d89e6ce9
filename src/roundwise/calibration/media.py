"""Finds the pictures and sounds of a chat, and puts them into its messages.

A record names them in the content of a message (`{"type": "image", "image": FILE}`, OpenAI's `image_url`
and `input_audio`), or in lists `images` and `audios` beside messages that say where they stand
(`{"type": "image"}`, or `<image>` in a text). A field that no message refers to is not looked at.
`encoded_media.py` reads the files.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from roundwise.errors import CalibrationError

#: Kinds of media -> names of the fields beside messages that list them, and OpenAI's type of a part.
KINDS = {"image": (("images", "image"), "image_url"), "audio": (("audios", "audio"), "input_audio")}
#: Places for media in texts.
MARKS = re.compile(r"\n?<(image|audio)>\n?")
#: Keys of a part that hold the medium.
SOURCES = ("image", "audio", "image_url", "input_audio", "url", "path", "base64", "data", "bytes")
UNSUPPORTED = ("video", "video_url")


def has_media(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Returns True if messages of a chat have pictures or sounds."""
    return any(kind_of(part) for message in messages for part in parts_of(message))


def place_media(
    messages: list[dict[str, Any]], record: Mapping[str, Any], folder: Path
) -> list[dict[str, Any]]:
    """Returns messages with the pictures and sounds of their record in their content.

    Args:
        messages: the chat of the record.
        record: the record.
        folder: folder of the file it is from; names of media are relative to it.

    Returns:
        The messages; media are parts such as {"type": "image", "image": path, bytes or picture}.

    Raises:
        CalibrationError: there are fewer media than places for them, one is not a local file, or there
            are videos.
    """
    waiting = {kind: _listed(record, fields) for kind, (fields, _) in KINDS.items()}
    return [_placed(message, waiting, folder) for message in messages]


def _listed(record: Mapping[str, Any], fields: tuple[str, ...]) -> list[Any]:
    value: Any = next((record[name] for name in fields if record.get(name)), [])
    return list(value) if isinstance(value, list | tuple) else [value]


def _placed(message: dict[str, Any], waiting: dict[str, list[Any]], folder: Path) -> dict[str, Any]:
    """Returns a message whose places for media have a medium."""
    content = message.get("content")
    if isinstance(content, str):
        if not any(waiting[kind] for kind in MARKS.findall(content)):
            return message
        texts = MARKS.split(content)  # text, kind, text, kind, …, text
        content = [{"type": "text", "text": text} for text in texts]
        content[1::2] = [{"type": kind} for kind in texts[1::2]]
        content = [part for part in content if part.get("text") != ""]
    if not isinstance(content, list):
        return message
    return {**message, "content": [_filled(part, waiting, folder) for part in content]}


def _filled(part: Any, waiting: dict[str, list[Any]], folder: Path) -> Any:
    kind = kind_of(part)
    if kind is None:  # Parquet has all fields in every part
        is_part = isinstance(part, Mapping)
        return {k: v for k, v in part.items() if v is not None} if is_part else part
    source = next((part[key] for key in SOURCES if part.get(key) is not None), None)
    if source is None:
        if not waiting[kind]:
            fields = KINDS[kind][0]
            raise CalibrationError(f"a message has a place for {kind}, but too few {fields[0]}")
        source = waiting[kind].pop(0)
    return {"type": kind, kind: _local(source, folder)}


def kind_of(part: Any) -> str | None:
    """Returns "image" or "audio" for a part of a message that stands for one.

    Raises:
        CalibrationError: it is a video.
    """
    given = part.get("type") if isinstance(part, Mapping) else None
    if given in UNSUPPORTED:
        raise CalibrationError("videos are not supported: give pictures of them")
    return next((kind for kind, (_, other) in KINDS.items() if given in (kind, other)), None)


def parts_of(message: Mapping[str, Any]) -> list[Any]:
    """Returns the parts of a message's content; a text is one part."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content if isinstance(content, list) else []


def _local(source: Any, folder: Path) -> Any:
    """Returns a source of a medium: a path, bytes, or an object that `datasets` has made of it."""
    if isinstance(source, Mapping):  # OpenAI's {"url": …} and {"data": …}, or of `datasets`
        source = next(
            (source[key] for key in ("bytes", "data", "url", "path") if source.get(key)), ""
        )
    if not isinstance(source, str):
        return source
    if source.startswith(("http://", "https://")):
        raise CalibrationError(f"{source[:80]} is an address: download it and give the file's path")
    if source.startswith("data:"):
        source = source.partition(",")[2]
    elif len(source) < 4096 and (folder / source.removeprefix("file://")).is_file():
        return folder / source.removeprefix("file://")
    try:
        decoded = base64.b64decode(source, validate=True) if len(source) >= 64 else b""
    except (binascii.Error, ValueError):
        decoded = b""
    if not decoded:
        raise CalibrationError(f"{source[:80]!r} is neither a file in {folder} nor base64")
    return decoded
