"""Pictures and sounds are found wherever records have them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from roundwise.calibration.media import has_media, place_media
from roundwise.calibration.records import Chat
from roundwise.calibration.sources import read_documents
from roundwise.errors import CalibrationError

TEXT = {"type": "text", "text": "What is it?"}
BYTES = bytes(range(60))
URL = "data:image/png;base64," + base64.b64encode(BYTES).decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "a.wav"):
        (tmp_path / name).write_bytes(BYTES)
    return tmp_path


def placed(folder: Path, content: Any, **record: Any) -> Any:
    (message,) = place_media([{"role": "user", "content": content}], record, folder)
    return message["content"]


def test_forms_of_a_place(folder: Path) -> None:
    a, b = ({"type": "image", "image": folder / f"{name}.png"} for name in "ab")
    sound = {"type": "audio", "audio": folder / "a.wav"}
    data = {"type": "image", "image": BYTES}
    for part, expected in [
        ({"type": "image", "image": "a.png"}, a),
        ({"type": "image", "path": str(folder / "a.png"), "text": None}, a),
        ({"type": "image", "url": f"file://{folder / 'a.png'}"}, a),
        ({"type": "image", "image": {"bytes": None, "path": "a.png"}}, a),
        ({"type": "image", "image": {"bytes": BYTES, "path": None}}, data),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, data),
        ({"type": "audio", "audio": "a.wav"}, sound),
        (
            {"type": "input_audio", "input_audio": {"data": URL.partition(",")[2]}},
            {"type": "audio", "audio": BYTES},
        ),
    ]:
        assert placed(folder, [part, {**TEXT, "image": None}]) == [expected, TEXT]
    here = {"type": "image"}
    assert placed(folder, [here, TEXT, here], images=["a.png", "b.png"]) == [a, TEXT, b]
    assert placed(folder, "<image>\nWhat is it?", image="a.png") == [a, TEXT]
    assert placed(folder, "<image><audio>", images=["b.png"], audio=["a.wav"]) == [b, sound]


def test_fields_that_no_message_refers_to_are_not_looked_at(folder: Path) -> None:
    assert placed(folder, "What is it?", image="https://a.b/c.png") == "What is it?"
    assert placed(folder, "What is <image>?") == "What is <image>?"
    assert placed(folder, [TEXT], images=None) == [TEXT]
    assert placed(folder, None) is None


def test_which_chats_have_media(folder: Path) -> None:
    assert has_media([{"content": [TEXT]}, {"content": [{"type": "audio"}]}])
    assert not has_media([{"content": [TEXT]}, {"content": "image"}, {"tool_calls": []}])


def test_what_cannot_be_used_is_refused_with_its_line(folder: Path) -> None:
    def refused(message: str, content: Any, **record: Any) -> None:
        chat = {"messages": [{"role": "user", "content": content}], **record}
        (folder / "a.jsonl").write_text("{}\n" + json.dumps(chat))
        with pytest.raises(CalibrationError, match=rf"a\.jsonl, line 2: {message}"):
            read_documents(str(folder / "a.jsonl"))

    here = {"type": "image"}
    refused("a message has a place for image, but too few images", [here, here], images=["a.png"])
    refused("https://a.b/c.png is an address: download it", [{**here, "url": "https://a.b/c.png"}])
    refused("'c.png' is neither a file in .* nor base64", [{**here, "image": "c.png"}])
    refused(
        "videos are not supported: give pictures of them", [{"type": "video", "video": "a.mp4"}]
    )


def test_records_of_a_file(folder: Path) -> None:
    chat = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    (folder / "a.json").write_text(json.dumps([{"image": "b.png", "conversations": chat}]))
    assert read_documents(str(folder / "a.json")).documents == [
        Chat(
            [
                {"role": "user", "content": [{"type": "image", "image": folder / "b.png"}, TEXT]},
                {"role": "assistant", "content": "A cat."},
            ]
        )
    ]
